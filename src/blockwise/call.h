#pragma once

#include <arguments/alibi_attention.h>
#include <blockwise/padded.h>
#include <blockwise/second_order.h>

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <tuple>

// Calls of attention, padded or packed, as those of padded batches. What computes a batch is what the dispatch keys
// differ in.
namespace posenc::blockwise {

/// `(out, lse)` of a batch: like q, and `[B, Hq, Sq]` in the dtype of sums.
using Forward = c10::function_ref<std::tuple<at::Tensor, at::Tensor>(const Padded&)>;

/// The gradients of q, k, v, and of the slopes where `slopes_grad`.
/// @param grad_lse  undefined means zero.
using Backward = c10::function_ref<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const Padded& batch,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const at::Tensor& out,
    const at::Tensor& lse,
    bool slopes_grad)>;

/// The sums of `alibi_attention_slope_sums` of a batch.
using SlopeSums = c10::function_ref<at::Tensor(const Padded& batch, const at::Tensor& grad_out, const at::Tensor& lse)>;

std::tuple<at::Tensor, at::Tensor> forward(
    const arguments::AlibiAttention& call,
    const arguments::AttentionTensors& inputs,
    Forward compute);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const arguments::AlibiAttention& call,
    const arguments::AttentionBackwardArguments& arguments,
    bool slopes_grad,
    Backward compute);

/// Of padded tensors alone.
at::Tensor slope_sums(
    const arguments::AlibiAttention& call,
    const arguments::AttentionSlopeSumsArguments& arguments,
    SlopeSums compute);

/// The same on all devices.
/// @param grad_lse  undefined means zero.
SecondOrderResult double_backward(
    const arguments::AlibiAttention& call,
    const arguments::AttentionTensors& inputs,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const SecondOrderGrads& grads);

}  // namespace posenc::blockwise
