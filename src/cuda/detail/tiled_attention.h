#pragma once

#include <arguments/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <string>
#include <tuple>

// Attention by the kernels of this library, for padded and packed sequences: float16 and bfloat16 on compute capability
// 8.0 and later. Lengths are read by the kernels, so no sequence is padded or copied.
namespace posenc::cuda {

/// The reason why the kernels cannot compute a call; empty if they can.
std::string why_not_tiled(const arguments::AlibiAttention& call, const arguments::AttentionTensors& inputs);

/// `(out, lse)` of a call.
std::tuple<at::Tensor, at::Tensor> tiled_attention(
    const arguments::AlibiAttention& call,
    const arguments::AttentionTensors& inputs);

/// The gradients of q, k, v and the slopes. The last is undefined unless `slopes_grad`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> tiled_attention_backward(
    const arguments::AlibiAttention& call,
    const arguments::AttentionBackwardArguments& arguments,
    bool slopes_grad);

/// `alibi_attention_slope_sums` of padded tensors.
at::Tensor tiled_attention_slope_sums(
    const arguments::AlibiAttention& call,
    const arguments::AttentionSlopeSumsArguments& arguments);

}  // namespace posenc::cuda
