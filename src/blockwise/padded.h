#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <optional>

namespace posenc::blockwise {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// A call of `softmax(softcap(scale q k^T) + bias + mask) v` on tensors `[B, S, H, D]`. All calls of attention, padded
/// or packed, are computed in this form.
struct Padded {
  at::Tensor q, k, v;                   // zeros past the lengths
  at::Tensor slopes;                    // [Hq] or [B, Hq]; undefined: no bias
  at::Tensor seqlens_q, seqlens_k;      // int64 [B]; undefined: all rows, all keys
  at::Tensor nan_if_too_long;           // [B], NaN where a length is beyond its tensor, else 0; or undefined
  std::optional<int64_t> query_offset;  // nullopt: `seqlens_k[b] - seqlens_q[b]`, both are defined then
  double scale;
  bool causal;
  std::optional<int64_t> window_left, window_right;  // as in `arguments::AlibiAttention`
  std::optional<double> softcap;

  int64_t batch() const { return q.size(0); }
  int64_t q_len() const { return q.size(1); }
  int64_t k_len() const { return k.size(1); }
  int64_t q_heads() const { return q.size(2); }
  int64_t k_heads() const { return k.size(2); }
  int64_t head_dim() const { return q.size(3); }
};

}  // namespace posenc::blockwise
