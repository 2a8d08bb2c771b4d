#pragma once

#include <posenc/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

// What `alibi_attention` and its backward pass accept, as contract/alibi.h for the rest of the family.
namespace posenc::contract {

/// A checked call. Sequences are counted as in a padded batch: of a packed one, `batch` is their number, and `q_len` and
/// `k_len` are the lengths that none exceeds.
struct AlibiAttention {
  int64_t batch, q_len, k_len;
  int64_t q_heads, k_heads, head_dim;
  double scale;
  bool causal;
  // Nothing: length in keys less length in queries, of every sequence its own. The host knows it to be 0 where both are
  // one tensor.
  std::optional<int64_t> query_offset;
  at::Tensor seqlens_q, seqlens_k;        // [B] or undefined
  at::Tensor cu_seqlens_q, cu_seqlens_k;  // [B + 1], both or none

  bool packed() const { return cu_seqlens_q.defined(); }
};

/// Checks a call of `alibi_attention`.
/// @throws c10::Error  naming the argument, what was expected and what came; as all functions here.
AlibiAttention alibi_attention(
    const char* op,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const ALiBiAttentionOptions& options);

/// Checks a call of `alibi_attention_backward`.
AlibiAttention alibi_attention_backward(
    const char* op,
    const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& out,
    const at::Tensor& lse,
    const ALiBiAttentionOptions& options);

/// Checks a call of `alibi_attention_slope_sums`.
AlibiAttention alibi_attention_slope_sums(
    const char* op,
    const at::Tensor& grad_out,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& lse,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset);

}  // namespace posenc::contract
