#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

// Attention by cuDNN: the calls that it takes, brought to the forms of graph that it is known to answer right. Each
// form is held against float64 in tests/alibi_attention_cuda_test.cpp; none is built that is not.
namespace posenc::cuda {

/// Why a call has to be computed otherwise; empty when cuDNN takes it.
std::string why_not_cudnn(const blockwise::Padded& call);

/// As `blockwise::blockwise`, for calls that cuDNN takes.
std::tuple<at::Tensor, at::Tensor> cudnn_attention(const blockwise::Padded& call);

/// `x` of the shape of q, written out where its rows are not what cuDNN and tensor cores read: the gradient of sum()
/// has strides of 0.
at::Tensor readable_rows(const blockwise::Padded& call, const at::Tensor& x);

/// The gradients of q, k and v.
/// @param grad_out,out  `readable_rows`.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cudnn_attention_backward(
    const blockwise::Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& out,
    const at::Tensor& lse);

}  // namespace posenc::cuda
