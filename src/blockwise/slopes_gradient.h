#pragma once

#include <ATen/core/Tensor.h>

namespace posenc::blockwise {

/// The gradient of the slopes, float64 of the shape of `slopes`, `[Hq]` or `[B, Hq]`.
/// @param sums  `alibi_attention_slope_sums` over all keys, float64 `[4, B, Hq, Sq]`.
/// @param grad_lse  `[B, Hq, Sq]`; undefined means zero.
at::Tensor slopes_gradient(const at::Tensor& sums, const at::Tensor& grad_lse, const at::Tensor& slopes);

}  // namespace posenc::blockwise
