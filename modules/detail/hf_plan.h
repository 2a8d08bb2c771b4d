#pragma once

#include "hf_model_config.h"

#include <posenc/frequencies.h>

namespace posenc::detail {

/// The plan that scales the frequencies of a layer. Logs a warning for fields that the plan does not read.
///
/// @param part  `partial_rotary_factor` of the layer.
RotaryScaling hf_plan(const HfModelConfig& model, const HfLayer& layer, double part);

}  // namespace posenc::detail
