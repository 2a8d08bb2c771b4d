#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <tuple>

// Attention in LibTorch's matrix products, one block of query rows at a time, for every device, dtype and head size.
namespace posenc::blockwise {

/// @return `(out, lse)`: out like q, lse `[B, Hq, Sq]` in the dtype of sums.
std::tuple<at::Tensor, at::Tensor> blockwise(const Padded& call);

/// @param grad_lse  undefined means zero.
/// @param slopes_grad  whether the gradient of the slopes is computed; false without slopes.
/// @return the gradients of q, k, v and the slopes; the last is undefined unless `slopes_grad`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> blockwise_backward(
    const Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const at::Tensor& out,
    const at::Tensor& lse,
    bool slopes_grad);

/// Computes `alibi_attention_slope_sums`, float64 `[4, B, Hq, Sq]`.
at::Tensor blockwise_slope_sums(const Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

}  // namespace posenc::blockwise
