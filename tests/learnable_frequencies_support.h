#pragma once

#include "support.h"

#include <utility>

/// Shared by the tests of derivatives by frequencies.
namespace posenc::test {

/// The gradient of inv_freq by a scalar loop in float64, and an upper bound of its magnitude: the sum of absolute terms
/// with 1 in place of all cosines and sines.
std::pair<at::Tensor, at::Tensor> scalar_frequency_gradient(
    const at::Tensor& inv_freq,
    const at::Tensor& grad_cos,
    const at::Tensor& grad_sin,
    double attention_factor);

}  // namespace posenc::test
