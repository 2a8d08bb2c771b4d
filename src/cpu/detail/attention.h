#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <tuple>

// Attention on a CPU in one pass over tiles of keys: the functions of `blockwise/call.h`. Results have the same bits
// every time and for every number of threads.
namespace posenc::cpu {

/// @return `(out, lse)`: out like q, lse `[B, Hq, Sq]` in the dtype of sums.
std::tuple<at::Tensor, at::Tensor> attention(const blockwise::Padded& call);

/// @param grad_lse  undefined means zero.
/// @return the gradients of q, k, v and the slopes; the last is undefined unless `slopes_grad`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const blockwise::Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const at::Tensor& out,
    const at::Tensor& lse,
    bool slopes_grad);

}  // namespace posenc::cpu
