#pragma once

#include <contract/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// Attention of any kind as that of a padded batch, the one form that is computed. Shared by the dispatch keys.
namespace posenc::attention {

/// `softmax(scale q k^T + bias + mask) v` of `[B, S, H, D]`.
struct Padded {
  at::Tensor q, k, v;
  at::Tensor slopes;                    // [Hq]
  at::Tensor seqlens_q, seqlens_k;      // int64 [B]; undefined: all rows, all keys
  at::Tensor poison;                    // [B], NaN where a sequence is not as promised, else 0; or undefined
  std::optional<int64_t> query_offset;  // nothing: seqlens_k - seqlens_q, which are there then
  double scale;
  bool causal;

  int64_t batch() const { return q.size(0); }
  int64_t q_len() const { return q.size(1); }
  int64_t k_len() const { return k.size(1); }
  int64_t q_heads() const { return q.size(2); }
  int64_t k_heads() const { return k.size(2); }
  int64_t head_dim() const { return q.size(3); }
};

/// Moves tokens between packed tensors `[T, ...]` and padded ones `[N, max_len, ...]`, without a look at `cu_seqlens`
/// from the host. Indices outside of the tensors are never formed, whatever it holds.
class Packing {
 public:
  Packing(const at::Tensor& cu_seqlens, int64_t tokens, int64_t max_len);

  /// Lengths, int64 `[N]`.
  const at::Tensor& seqlens() const { return seqlens_; }

  /// Bool `[N]`: where a sequence is longer than `max_len`, or not within the tokens.
  const at::Tensor& broken() const { return broken_; }

  /// `[T, ...]` as `[N, max_len, ...]`, zeros behind the lengths.
  at::Tensor pad(const at::Tensor& packed) const;

  /// `[N, max_len, ...]` as `[T, ...]`, with `fill` for tokens outside of all sequences.
  at::Tensor unpad(const at::Tensor& padded, double fill = 0) const;

 private:
  int64_t tokens_, max_len_;
  at::Tensor seqlens_, broken_;
  at::Tensor sources_;       // token of each padded row, [N * max_len]
  at::Tensor behind_;        // rows behind the lengths, [N, max_len]
  at::Tensor destinations_;  // padded row of each token, [T]
  at::Tensor outside_;       // tokens in no sequence, [T]
};

/// A checked call, with what brings its results to the form of its arguments.
class PaddedCall {
 public:
  PaddedCall(
      const contract::AlibiAttention& call,
      const at::Tensor& q,
      const at::Tensor& k,
      const at::Tensor& v,
      const at::Tensor& slopes);

  const Padded& padded() const { return padded_; }

  /// Tensors like q and like lse, from the form of the arguments to the padded one.
  at::Tensor pad_q(const at::Tensor& x) const;
  at::Tensor pad_lse(const at::Tensor& x) const;

  /// And back; tensors like k too.
  at::Tensor unpad_q(const at::Tensor& x) const;
  at::Tensor unpad_k(const at::Tensor& x) const;
  at::Tensor unpad_lse(const at::Tensor& x, double fill) const;

 private:
  Padded padded_;
  std::optional<Packing> of_q_, of_k_;
};

}  // namespace posenc::attention
