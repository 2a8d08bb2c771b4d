#pragma once

#include <contract/rotary_problem.h>

#include <ATen/core/Tensor.h>

namespace posenc::cpu {

/// Fills the outputs of `problem`, whose dtype and device are those of `like`: what all operators that rotate call.
void rotate(const RotaryProblem& problem, const at::Tensor& like);

}  // namespace posenc::cpu
