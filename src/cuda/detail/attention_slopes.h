#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

namespace posenc::cuda {

/// The gradient of the slopes of a call that cuDNN takes, float32 `[Hq]`: the same bits every time.
/// @param grad_out  `readable_rows`.
at::Tensor attention_slopes_backward(const blockwise::Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

/// Of a call that may know a part of the keys, with the `lse` of all of them: the sums over its keys of P, P d, P dP
/// and P dP d, d the distance, float64 `[4, B, Hq, Sq]`.
at::Tensor attention_slope_sums(const blockwise::Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

}  // namespace posenc::cuda
