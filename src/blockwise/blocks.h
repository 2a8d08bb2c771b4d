#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

// A call of attention as matrix products of blocks of query rows, in LibTorch's operations.
namespace posenc::blockwise {

/// `lse` with 0 in the place of -inf, which rows without visible keys have: exp(-inf - lse) is then 0 and not NaN.
at::Tensor finite(const at::Tensor& lse);

/// Query rows `begin` to `end - 1` of all sequences, and `keys` keys from `first_key` on. No row of the block sees
/// another key.
struct Block {
  int64_t begin, end, first_key, keys;

  int64_t rows() const { return end - begin; }
};

/// Scores of the rows of a block, `[B, Hq, rows, keys]`.
struct Logits {
  at::Tensor values;     // scaled, capped, biased and masked: the logits of the softmax
  at::Tensor tanh;       // tanh(scaled / softcap), 0 where the row does not see the key; undefined without softcap
  at::Tensor distances;  // [1 or B, 1, rows, keys], in the dtype of sums; undefined without slopes
};

/// The gradient of the scaled scores from `grad`, that of the logits.
at::Tensor through_softcap(const at::Tensor& grad, const Logits& logits);

/// A call divided into blocks. Products are float32 (float64 for float64). The matrices of the G = Hq / Hk query heads
/// that share a key head are stacked: `[B * Hk, G * rows, D]`.
///
/// NaN and infinity in a key or value do not reach rows that do not see it: probabilities are 0 there, and products
/// with probabilities read `finite_k` and `finite_v`.
class Blocks {
 public:
  /// @param call  must outlive this object.
  explicit Blocks(const Padded& call);

  at::ScalarType dtype() const { return dtype_; }
  at::TensorOptions options() const { return call_.q.options().dtype(dtype_); }

  /// Calls `body` with every block that sees keys.
  template <typename Body>
  void for_each(const Body& body) const {
    const int64_t step = rows_of_block();
    for (int64_t begin = 0; begin < call_.q_len(); begin += step) {
      const int64_t end = std::min(call_.q_len(), begin + step);
      const auto [first_key, end_key] = visible_keys(begin, end);
      if (first_key < end_key && call_.batch() * call_.q_heads() > 0) {
        body(Block{begin, end, first_key, end_key - first_key});
      }
    }
  }

  /// Rows of `x`, `[B, Sq, Hq, D]`, as matrices `[B * Hk, G * rows, D]` in the dtype of sums.
  at::Tensor rows_of(const at::Tensor& x, const Block& block) const;

  /// Writes matrices of this shape to the rows of `x`, rounded once.
  void put_rows(const at::Tensor& matrices, const Block& block, const at::Tensor& x) const;

  /// Rows of `x`, `[B, Hq, Sq]`, as `[B, Hq, rows, 1]`, a view.
  static at::Tensor column_of(const at::Tensor& x, const Block& block);

  /// `x`, `[B, Sk, Hk, D]`, as matrices `[B * Hk, Sk, D]` in the dtype of sums; and the inverse, in the dtype of `x`.
  at::Tensor key_matrices(const at::Tensor& x) const;
  at::Tensor like_keys(const at::Tensor& matrices, const at::Tensor& x) const;

  /// Zeros of the shape of `key_matrices`, to add gradients to.
  at::Tensor zeros_of_keys() const;

  /// The keys of a block, `[B * Hk, keys, D]`, of `key_matrices`; a view.
  static at::Tensor keys_of(const at::Tensor& matrices, const Block& block);

  /// Keys of a block, `[B * Hk, keys, D]`.
  at::Tensor k(const Block& block) const { return keys_of(k_, block); }

  /// Keys and values of a block. NaN and infinity are replaced by 0 if some row does not see all keys before its
  /// `seqlens_k`.
  at::Tensor finite_k(const Block& block) const;
  at::Tensor finite_v(const Block& block) const { return keys_of(finite_v_, block); }

  /// Whether some row does not see all keys before its `seqlens_k`.
  bool hides_values() const { return hides_values_; }

  /// All values, `[B * Hk, Sk, D]`.
  const at::Tensor& v() const { return v_; }

  /// Matrices `[B * Hk, G * rows, keys]` as scores `[B, Hq, rows, keys]`, and back; views.
  at::Tensor as_scores(const at::Tensor& matrices, const Block& block) const;
  at::Tensor as_matrices(const at::Tensor& scores, const Block& block) const;

  /// `rows keys^T` as scores, for `rows` from `rows_of` and `keys` from `keys_of`.
  at::Tensor product(const at::Tensor& rows, const at::Tensor& keys, const Block& block) const;

  /// `rowsum(dout out) - dlse`, `[B, Hq, Sq]`. An undefined `grad_lse` means zero.
  at::Tensor row_shift(const at::Tensor& grad_out, const at::Tensor& grad_lse, const at::Tensor& out) const;

  /// Slopes or their gradients, `[Hq]` or `[B, Hq]`, as `[1 or B, Hq, 1, 1]`; a view.
  static at::Tensor beside_scores(const at::Tensor& slopes);

  /// Sums of scores `[B, Hq, rows, keys]` that belong to each slope of the call, float64 of the shape of the slopes.
  at::Tensor sums_by_slope(const at::Tensor& scores) const;

  /// The logits of the rows `q`.
  Logits logits(const at::Tensor& q, const Block& block) const;

 private:
  int64_t rows_of_block() const;
  /// The first key that one of the rows sees, and the end of their keys.
  std::pair<int64_t, int64_t> visible_keys(int64_t begin, int64_t end) const;
  /// Query position minus key position, `[1 or B, rows, keys]`.
  at::Tensor differences(const Block& block) const;
  /// bool `[1 or B, 1, rows, keys]`: the row does not see the key; undefined: all rows see all keys.
  at::Tensor hidden(const Block& block, const at::Tensor& differences) const;

  // Sums keep their dtype in autocast regions.
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  const Padded& call_;
  at::ScalarType dtype_;
  int64_t group_;
  // Keys that a row sees before and after its position; nullopt: all. A causal mask is a right window of 0.
  std::optional<int64_t> left_, right_;
  at::Tensor k_, v_, finite_v_;  // [B * Hk, Sk, D]
  mutable at::Tensor finite_k_;  // made when it is first read: by backward passes
  bool hides_values_ = false;    // whether finite_k_ and finite_v_ have zeros in the place of NaN and infinity
  at::Tensor slopes_, keys_, rows_, positions_;
};

}  // namespace posenc::blockwise
