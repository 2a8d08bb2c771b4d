#pragma once

#include <arguments/alibi_attention.h>
#include <posenc/alibi_attention.h>
#include <posenc/attention.h>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <tuple>

// The operators of attention below the public function. The integers of their options may be symbols of a graph that is
// being traced.
namespace posenc {

using arguments::AttentionBackwardArguments;
using arguments::AttentionDoubleBackwardArguments;
using arguments::AttentionSinksArguments;
using arguments::AttentionSlopeSumsArguments;
using arguments::AttentionTensors;
using arguments::ConcreteAttentionOptions;
using arguments::SymbolicAttentionOptions;

/// `(dq, dk, dv, dslopes)`.
using AttentionGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
/// The gradients of grad_out, grad_lse, q, k, v and slopes.
using AttentionSecondGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Calls through the dispatcher.
namespace dispatch {

/// `posenc::attention_with_lse`.
std::tuple<at::Tensor, at::Tensor> alibi_attention(
    const SymbolicAttentionOptions& options,
    const AttentionTensors& inputs);

/// Results of attention with sinks, from those without: with the logit s of a head,
///
///     out exp(lse) / (exp(lse) + exp(s))   and   log(exp(lse) + exp(s)).
///
/// Tensor operations, which LibTorch differentiates.
std::tuple<at::Tensor, at::Tensor> attention_sinks(const AttentionSinksArguments& arguments);

/// The gradients of `attention_with_lse` from its arguments and results, recomputing the probabilities
/// P = exp(S - lse) (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B): with
///
///     dP = dout V^T,   dS = P (dP - rowsum(dout out) + dlse),
///
/// dq = scale dS K, dk = scale dS^T Q, dv = P^T dout and dslopes[h] = -sum over b, i, j of dS |distance|. For slopes
/// `[B, Hq]` the sum is over i and j.
/// Deterministic. Can be differentiated with respect to grad_out, grad_lse, q, k, v and slopes. `out` and `lse` are
/// functions of these: no gradient flows to them.
///
/// @param arguments  `grad_lse` has the shape of `lse`; nullopt means zero.
/// @param slopes_grad  whether dslopes is computed.
/// @return `(dq, dk, dv, dslopes)`; the last is of the shape of slopes, float64 for float64, float32 for all others,
/// and undefined
///   unless `slopes_grad`, or without slopes.
AttentionGradients alibi_attention_backward(
    const SymbolicAttentionOptions& options,
    const AttentionBackwardArguments& arguments,
    bool slopes_grad);

/// The gradients of `alibi_attention_backward` from gradients of its results, by the formulas of
/// blockwise/second_order.h, in memory that grows with Sq + Sk.
///
/// @param arguments  `grad_grad_q`, `grad_grad_k`, `grad_grad_v` and `grad_grad_slopes` are the gradients of dq, dk, dv
///   and dslopes, of their shapes and dtypes; nullopt means zero.
/// @return the gradients of grad_out, grad_lse, q, k, v and slopes; the last is undefined without slopes.
AttentionSecondGradients alibi_attention_double_backward(
    const SymbolicAttentionOptions& options,
    const AttentionDoubleBackwardArguments& arguments);

/// The contribution of a part of the keys to the gradient of the slopes: for each row, the sums of P x over the keys of
/// the call, with P = exp(S - lse) and the lse over all keys, for four quantities x:
///
///     1,   |distance|,   dP,   dP |distance|,        dP = dout V^T.
///
/// Sums over all keys give the gradient: dslopes[h] = -sum over b, i of E[dP d] - E[dP] E[d], with E[x] the sum of P x
/// over the sum of P. E[dP] is also rowsum(dout out), but `out` is rounded, and this error times a distance of
/// thousands is larger than the gradient.
///
/// @param arguments  padded tensors, and slopes; `lse` is `[B, Hq, Sq]`.
/// @return float64 `[4, B, Hq, Sq]`.
at::Tensor alibi_attention_slope_sums(
    const SymbolicAttentionOptions& options,
    const AttentionSlopeSumsArguments& arguments);

}  // namespace dispatch

}  // namespace posenc
