#pragma once

#include <arguments/alibi_attention.h>
#include <blockwise/padded.h>
#include <blockwise/second_order.h>

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <tuple>

// Computes calls of attention, padded or packed, as calls on padded batches. The functions that compute a batch differ
// between the dispatch keys.
namespace posenc::blockwise {

/// A call of padded tensors as it is. What is computed from it needs zeros past the lengths, and lengths in int64.
Padded padded_view(const arguments::AlibiAttention& call, const arguments::AttentionTensors& inputs);

/// Computes `(out, lse)` of a batch: out of the shape and dtype of q, lse `[B, Hq, Sq]` in the dtype of sums.
using Forward = c10::function_ref<std::tuple<at::Tensor, at::Tensor>(const Padded&)>;

/// Computes the gradients of q, k, v and the slopes of a batch. The last is undefined unless `slopes_grad`, which is
/// false without slopes.
/// @param grad_lse  undefined means zero.
using Backward = c10::function_ref<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const Padded& batch,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const at::Tensor& out,
    const at::Tensor& lse,
    bool slopes_grad)>;

/// Computes the sums of `alibi_attention_slope_sums` for a batch.
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

/// Accepts padded tensors only.
at::Tensor slope_sums(
    const arguments::AlibiAttention& call,
    const arguments::AttentionSlopeSumsArguments& arguments,
    SlopeSums compute);

/// Uses `blockwise_double_backward` on all devices.
/// @param grad_lse  undefined means zero.
SecondOrderResult double_backward(
    const arguments::AlibiAttention& call,
    const arguments::AttentionTensors& inputs,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const SecondOrderGrads& grads);

}  // namespace posenc::blockwise
