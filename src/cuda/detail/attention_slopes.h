#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

namespace posenc::cuda {

/// Whether the current device runs the kernels of the functions below, which need compute capability 9.0.
bool has_attention_slopes_kernels();

/// The gradient of the slopes, float32 `[Hq]`, of a call that cuDNN computes. Deterministic.
/// @param grad_out  as returned by `readable_rows`.
at::Tensor attention_slopes_backward(const blockwise::Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

/// The sums of P, P d, P dP and P dP d over the keys of each row, d being the distance, float64 `[4, B, Hq, Sq]`.
/// @param lse  over all keys of the row, of which the call may have only a part.
at::Tensor attention_slope_sums(const blockwise::Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

}  // namespace posenc::cuda
