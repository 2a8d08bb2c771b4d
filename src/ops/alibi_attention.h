#pragma once

#include <arguments/alibi_attention.h>
#include <posenc/alibi_attention.h>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <tuple>

// The operators of attention below the public function. All take their options first, as one struct, in which integers
// may be symbols of a graph that is being traced.
namespace posenc {

using arguments::AttentionBackwardArguments;
using arguments::AttentionDoubleBackwardArguments;
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

/// `posenc::alibi_attention_with_lse`.
std::tuple<at::Tensor, at::Tensor> alibi_attention(
    const SymbolicAttentionOptions& options,
    const AttentionTensors& inputs);

/// The gradients of `alibi_attention_with_lse` from its arguments and results, recomputing the probabilities
/// P = exp(S - lse) (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B): with
///
///     dP = dout V^T,   dS = P (dP - rowsum(dout out) + dlse),
///
/// dq = scale dS K, dk = scale dS^T Q, dv = P^T dout and dslopes[h] = -sum over b, i, j of dS |distance|.
/// Deterministic. Can be differentiated with respect to grad_out, grad_lse, q, k, v and slopes. `out` and `lse` are
/// functions of these: no gradient flows to them.
///
/// @param grad_lse  of the shape of `lse`, or nothing for zeros.
/// @return `(dq, dk, dv, dslopes)`; the last is `[Hq]`, float64 for float64, float32 for all others, and undefined
///   unless `slopes_grad`.
AttentionGradients alibi_attention_backward(
    const SymbolicAttentionOptions& options,
    const AttentionBackwardArguments& arguments,
    bool slopes_grad);

/// The gradients of `alibi_attention_backward` from gradients of its results, by the formulas of
/// attention/second_order.h: in memory that grows with Sq + Sk.
///
/// @param grad_grad_q,grad_grad_k,grad_grad_v  gradients of dq, dk and dv, in their shapes; nothing for zeros.
/// @param grad_grad_slopes  the gradient of dslopes, `[Hq]`, float64 for float64, float32 for all others.
/// @return the gradients of grad_out, grad_lse, q, k, v and slopes.
AttentionSecondGradients alibi_attention_double_backward(
    const SymbolicAttentionOptions& options,
    const AttentionDoubleBackwardArguments& arguments);

/// What a call contributes to the gradient of the slopes, where it is of some of the keys of each row: of four
/// quantities x, the sums of P x over the keys of the call, with P = exp(S - lse) and the lse of all keys:
///
///     1,   |distance|,   dP,   dP |distance|,        dP = dout V^T.
///
/// Sums over all keys give the gradient: dslopes[h] = -sum over b, i of E[dP d] - E[dP] E[d], with E[x] the sum of P x
/// over that of P. The mean of dP is known from `out` only as far as that is not rounded, and times a distance of
/// thousands the rounding is larger than the gradient.
///
/// @param lse  `[B, Hq, Sq]`, as for `alibi_attention_backward`.
/// @return float64 `[4, B, Hq, Sq]`.
at::Tensor alibi_attention_slope_sums(
    const SymbolicAttentionOptions& options,
    const AttentionSlopeSumsArguments& arguments);

}  // namespace dispatch

}  // namespace posenc
