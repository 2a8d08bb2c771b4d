#pragma once

#include <arguments/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

// Packed sequences as padded batches.
namespace posenc::blockwise {

/// Where the tokens of packed tensors `[T, ...]` are in a padded batch `[n, max_len, ...]` of some of their sequences.
/// Indices beyond the tensors are never formed, whatever `cu_seqlens` holds.
class Packing {
 public:
  /// @param begins,lengths  int64 `[n]`: first token and length of each sequence of the batch.
  /// @param rows  int64 `[T]`: the row of each token in the batch, `sequence * max_len + offset`; -1 for tokens that
  ///   are not in the batch.
  Packing(const at::Tensor& begins, const at::Tensor& lengths, const at::Tensor& rows, int64_t max_len);

  /// Lengths, int64 `[n]`.
  const at::Tensor& seqlens() const { return seqlens_; }

  /// `packed` as `[n, max_len, ...]`, zeros behind the lengths.
  at::Tensor pad(const at::Tensor& packed) const;

  /// Copies the rows of `padded` to their tokens in `packed`. Other tokens keep their values.
  void unpad(const at::Tensor& padded, const at::Tensor& packed) const;

 private:
  int64_t max_len_;
  at::Tensor seqlens_;
  at::Tensor sources_;  // token of each row, [n * max_len]
  at::Tensor behind_;   // bool [n, max_len]: rows behind the lengths
  at::Tensor rows_;     // row of each token in `tokens_`; where that is undefined, of all tokens
  at::Tensor tokens_;   // tokens of the batch, on a CPU
  at::Tensor others_;   // bool [T]: tokens that are not in the batch, on other devices
};

/// The sequences of a packed call, divided into padded batches so that memory grows with the number of tokens and not
/// with that of sequences: lengths above L / 2 and up to L = 1, 2, 4, ... make a batch.
///
/// On a CPU the host reads the lengths, and a batch is as large as its sequences. On other devices the host does not
/// wait for them. Of T tokens there are at most `2 T / L` sequences of that batch, so it has as many entries, some of
/// them empty. Where padding every sequence to the longest takes at most twice the tokens, all sequences are one
/// batch.
///
/// Sequences without queries or without keys are in no batch.
class PackedBatches {
 public:
  explicit PackedBatches(const arguments::AlibiAttention& call, int64_t q_tokens, int64_t k_tokens);

  struct Batch {
    Packing of_q, of_k;
  };

  size_t size() const { return extents_.size(); }
  Batch batch(size_t i) const;

  /// Bool `[Tq]` and `[Tk]`: tokens of sequences that are longer than `max_seqlen` or not within the tensors. Undefined
  /// on a CPU, where such lengths are errors.
  const at::Tensor& invalid_q() const { return broken_q_; }
  const at::Tensor& invalid_k() const { return broken_k_; }

 private:
  /// All sequences of queries or of keys.
  struct Sequences {
    at::Tensor begins, lengths;   // int64 [N]
    at::Tensor sequence, offset;  // int64 [T]: of each token; the offset is -1 for tokens of no sequence
    at::Tensor broken;            // bool [N]; undefined on a CPU

    Sequences(const at::Tensor& cu_seqlens, int64_t tokens, int64_t max_len);
  };

  /// One batch: sequences `order_[first]` to `order_[first + count - 1]`.
  struct Extent {
    at::Tensor first, count;  // int64 [1]
    int64_t entries;          // at least `count`
    int64_t q_len, k_len;     // at least the lengths
  };

  void divide_on_cpu();
  void divide_by_capacity(int64_t q_len, int64_t k_len);
  Packing packing(const Sequences& of, const Extent& extent, int64_t max_len) const;

  int64_t q_tokens_, k_tokens_;
  Sequences of_q_, of_k_;
  at::Tensor broken_q_, broken_k_;
  at::Tensor order_;  // int64 [N]: sequences in the order of batches; undefined: one batch in their own order
  at::Tensor rank_;   // int64 [N]: the place of each sequence in `order_`
  std::vector<Extent> extents_;
};

}  // namespace posenc::blockwise
