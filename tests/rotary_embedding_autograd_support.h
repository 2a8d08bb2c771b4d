#pragma once

#include "support.h"

#include <vector>

/// Shared by the tests of derivatives of rotary_embedding.
namespace posenc::test {

/// One small call for each way to select rows of cos and sin.
std::vector<RotaryCase> small_rotary_cases();

/// Leaves with the values and strides of `inputs` that require grad as given.
RotaryInputs with_grad(const RotaryInputs& inputs, bool q, bool k, bool cos, bool sin);

}  // namespace posenc::test
