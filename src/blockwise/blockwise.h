#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <tuple>

// Attention in LibTorch's matrix products, one block of query rows at a time, for every device, dtype and head size.
namespace posenc::blockwise {

/// @return `(out, lse)`: like q, and `[B, Hq, Sq]` in the dtype of sums.
std::tuple<at::Tensor, at::Tensor> blockwise(const Padded& call);

/// @param grad_lse  may be undefined.
/// @return gradients of q, k, v, and of the slopes where `slopes_grad`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> blockwise_backward(
    const Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const at::Tensor& out,
    const at::Tensor& lse,
    bool slopes_grad);

/// `alibi_attention_slope_sums`.
at::Tensor blockwise_slope_sums(const Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

}  // namespace posenc::blockwise
