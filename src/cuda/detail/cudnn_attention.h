#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

// Attention by cuDNN. Calls are mapped to forms of graph that are validated (cudnn_validation.h);
// tests/alibi_attention_cuda_test.cpp compares each of them with float64.
namespace posenc::cuda {

/// The reason why cuDNN cannot compute a call; empty if it can.
std::string why_not_cudnn(const blockwise::Padded& call);

/// `rows_attention` for calls that cuDNN can compute.
std::tuple<at::Tensor, at::Tensor> cudnn_attention(const blockwise::Padded& call);

/// `x`, of the shape of q, as it is if cuDNN can read its rows, else a dense copy: the gradient of sum() has strides
/// of 0.
at::Tensor readable_rows(const blockwise::Padded& call, const at::Tensor& x);

/// The gradients of q, k and v.
/// @param grad_out,out  as returned by `readable_rows`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cudnn_attention_backward(
    const blockwise::Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& out,
    const at::Tensor& lse);

}  // namespace posenc::cuda
