#pragma once

#include <arguments/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

namespace posenc::blockwise {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// A call of `softmax(softcap(scale q k^T) + bias + mask) v` on tensors `[B, S, H, D]`. All calls of attention, padded
/// or packed, are computed in this form.
struct Padded : arguments::AttentionScores {
  at::Tensor q, k, v;               // zeros past the lengths
  at::Tensor slopes;                // [Hq] or [B, Hq]; undefined: no bias
  at::Tensor seqlens_q, seqlens_k;  // int64 [B]; undefined: all rows, all keys. Both are defined without query_offset
  at::Tensor nan_if_too_long;       // [B], NaN where a length is beyond its tensor, else 0; or undefined

  /// Without tensors.
  explicit Padded(const AttentionScores& scores) : AttentionScores(scores) {}

  int64_t batch() const { return q.size(0); }
  int64_t q_len() const { return q.size(1); }
  int64_t k_len() const { return k.size(1); }
  int64_t q_heads() const { return q.size(2); }
  int64_t k_heads() const { return k.size(2); }
  int64_t head_dim() const { return q.size(3); }
};

}  // namespace posenc::blockwise
