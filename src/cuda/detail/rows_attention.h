#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <tuple>

// Attention as matrix products of blocks of rows, by cuBLAS, with kernels of this library for the softmax and its
// derivative: float32 and float64, head sizes that the tiled kernels do not take, and GPUs before compute capability
// 8.0. The functions are those of blockwise/call.h.
namespace posenc::cuda {

std::tuple<at::Tensor, at::Tensor> rows_attention(const blockwise::Padded& call);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> rows_attention_backward(
    const blockwise::Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const at::Tensor& out,
    const at::Tensor& lse,
    bool slopes_grad);

at::Tensor rows_attention_slope_sums(const blockwise::Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

}  // namespace posenc::cuda
