#pragma once

#include "hf_model_config.h"

#include <posenc/frequencies.h>

namespace posenc::detail {

/// How the frequencies of a layer are stretched. Logs a warning for fields that its plan does not read.
///
/// @param part  `partial_rotary_factor` of the layer.
RotaryScaling hf_plan(const HfModelConfig& model, const HfLayer& layer, double part);

}  // namespace posenc::detail
