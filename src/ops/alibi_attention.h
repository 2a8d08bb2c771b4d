#pragma once

#include <posenc/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace posenc {

/// The gradients of `alibi_attention_with_lse` from its arguments and results, recomputing the probabilities
/// P = exp(S - lse) (Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B): with
///
///     dP = dout V^T,   dS = P (dP - rowsum(dout out) + dlse),
///
/// dq = scale dS K, dk = scale dS^T Q, dv = P^T dout and dslopes[h] = -sum over b, i, j of dS |distance|. Deterministic.
///
/// @param grad_lse  of the shape of `lse`, or nothing for zeros.
/// @return `(dq, dk, dv, dslopes)`; the last is `[Hq]`, float64 for float64, float32 for all others, and undefined
///   unless `slopes_grad`.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> alibi_attention_backward(
    const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& out,
    const at::Tensor& lse,
    const ALiBiAttentionOptions& options,
    bool slopes_grad);

/// What a call contributes to the gradient of the slopes, where it is of some of the keys of each row: of four
/// quantities x, the sums of P x over the keys of the call, with P = exp(S - lse) and the lse of all keys:
///
///     1,   |distance|,   dP,   dP |distance|,        dP = dout V^T.
///
/// Sums over all keys give the gradient: dslopes[h] = -sum over b, i of E[dP d] - E[dP] E[d], with E[x] the sum of P x
/// over that of P. Nothing less will do, because the mean of dP is known from `out` only as far as that is not rounded,
/// and times a distance of thousands the rounding is larger than the gradient.
///
/// @param lse  `[B, Hq, Sq]`, as for `alibi_attention_backward`.
/// @return float64 `[4, B, Hq, Sq]`.
at::Tensor alibi_attention_slope_sums(
    const at::Tensor& grad_out,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& lse,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset);

// The dispatcher knows no structs: options travel through it one by one. These make kernels for it of functions that
// take them together.

/// Of a function with the parameters of `alibi_attention_with_lse`.
template <auto Function>
std::tuple<at::Tensor, at::Tensor> alibi_attention_kernel(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset,
    const std::optional<at::Tensor>& seqlens_q,
    const std::optional<at::Tensor>& seqlens_k,
    const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k) {
  return Function(
      q, k, v, slopes,
      ALiBiAttentionOptions()
          .scale(scale)
          .causal(causal)
          .query_offset(query_offset)
          .seqlens_q(seqlens_q)
          .seqlens_k(seqlens_k)
          .cu_seqlens_q(cu_seqlens_q)
          .cu_seqlens_k(cu_seqlens_k)
          .max_seqlen_q(max_seqlen_q)
          .max_seqlen_k(max_seqlen_k));
}

/// Of a function with the parameters of `alibi_attention_backward`.
template <auto Function>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> alibi_attention_backward_kernel(
    const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& out,
    const at::Tensor& lse,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset,
    const std::optional<at::Tensor>& seqlens_q,
    const std::optional<at::Tensor>& seqlens_k,
    const std::optional<at::Tensor>& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q,
    std::optional<int64_t> max_seqlen_k,
    bool slopes_grad) {
  return Function(
      grad_out, grad_lse, q, k, v, slopes, out, lse,
      ALiBiAttentionOptions()
          .scale(scale)
          .causal(causal)
          .query_offset(query_offset)
          .seqlens_q(seqlens_q)
          .seqlens_k(seqlens_k)
          .cu_seqlens_q(cu_seqlens_q)
          .cu_seqlens_k(cu_seqlens_k)
          .max_seqlen_q(max_seqlen_q)
          .max_seqlen_k(max_seqlen_k),
      slopes_grad);
}

}  // namespace posenc
