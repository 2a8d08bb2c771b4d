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

/// Query rows `begin` to `end - 1` of all sequences, and the first `keys` keys: no row of the block sees a later one.
struct Block {
  int64_t begin, end, keys;
  at::Tensor distances;  // [1 or B, 1, rows, keys], in the dtype of sums
  at::Tensor hidden;     // bool of that shape: the row does not see the key; undefined: all rows see all keys

  int64_t rows() const { return end - begin; }
};

/// One call cut into blocks. Products are float32 (float64 for float64). Matrices of query heads that share a key head
/// are stacked: `[B * Hk, G * rows, D]` with G = Hq / Hk.
///
/// NaN and infinity in a key or value do not reach the rows that a causal mask hides it from, nor the rows behind
/// `seqlens_q`: products with probabilities, which are 0 there, read `finite_k` and `finite_v`.
class Blocks {
 public:
  /// @param call  is read for as long as this lives.
  explicit Blocks(const Padded& call);

  at::ScalarType dtype() const { return dtype_; }
  at::TensorOptions options() const { return call_.q.options().dtype(dtype_); }

  /// Calls `body` with every block that sees keys.
  template <typename Body>
  void for_each(const Body& body) const {
    const int64_t step = rows_of_block();
    for (int64_t begin = 0; begin < call_.q_len(); begin += step) {
      const int64_t end = std::min(call_.q_len(), begin + step);
      if (const int64_t keys = visible_keys(end); keys > 0 && call_.batch() * call_.q_heads() > 0) {
        body(block(begin, end, keys));
      }
    }
  }

  /// Rows of `x`, `[B, Sq, Hq, D]`, as matrices `[B * Hk, G * rows, D]` in the dtype of sums.
  at::Tensor rows_of(const at::Tensor& x, const Block& block) const;

  /// Writes such matrices into the rows of `x`, rounded once.
  void put_rows(const at::Tensor& matrices, const Block& block, const at::Tensor& x) const;

  /// Rows of `x`, `[B, Hq, Sq]`, as `[B, Hq, rows, 1]`, a view.
  static at::Tensor column_of(const at::Tensor& x, const Block& block);

  /// `x`, `[B, Sk, Hk, D]`, as matrices `[B * Hk, Sk, D]` in the dtype of sums, and the gradient of `x` from such ones.
  at::Tensor key_matrices(const at::Tensor& x) const;
  at::Tensor like_keys(const at::Tensor& matrices, const at::Tensor& x) const;

  /// Zeros of the shape of such matrices, to add gradients to.
  at::Tensor zeros_of_keys() const;

  /// The keys of a block, `[B * Hk, keys, D]`, of such matrices.
  static at::Tensor keys_of(const at::Tensor& matrices, const Block& block);

  /// Keys and values of a block, with zeros for NaN and infinity where some rows do not see all keys before their
  /// `seqlens_k`.
  at::Tensor finite_k(const Block& block) const { return keys_of(finite_k_, block); }
  at::Tensor finite_v(const Block& block) const { return keys_of(finite_v_, block); }

  /// Sums of what is not finite in the values: over keys 0 to j behind a causal mask, `[B * Hk, Sk, D]`, else over all,
  /// `[B * Hk, 1, D]`. Undefined where `finite_v` has all values. The forward pass alone needs it.
  at::Tensor infinities() const;

  /// Adds to `out`, the product of probabilities and `finite_v`, the part of `infinities` that its rows see.
  void add_visible_infinities(const at::Tensor& infinities, const at::Tensor& out, const Block& block) const;

  /// Matrices `[B * Hk, G * rows, keys]` as scores `[B, Hq, rows, keys]`, and back; views.
  at::Tensor as_scores(const at::Tensor& matrices, const Block& block) const;
  at::Tensor as_matrices(const at::Tensor& scores, const Block& block) const;

  /// `rows keys^T` as scores, of matrices from `rows_of` and of keys of the block.
  at::Tensor product(const at::Tensor& rows, const at::Tensor& keys, const Block& block) const;

  /// Scaled, biased and masked scores of the rows `q`.
  at::Tensor logits(const at::Tensor& q, const Block& block) const;

 private:
  int64_t rows_of_block() const;
  int64_t visible_keys(int64_t end) const;
  Block block(int64_t begin, int64_t end, int64_t keys) const;

  // Sums keep their dtype in an autocast region too.
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  const Padded& call_;
  at::ScalarType dtype_;
  int64_t group_;
  at::Tensor k_, finite_k_, finite_v_;  // [B * Hk, Sk, D]
  bool hides_values_ = false;           // whether the latter two have zeros for what is not finite
  at::Tensor slopes_, keys_, rows_, positions_;
};

}  // namespace posenc::blockwise
