#pragma once

#include <arguments/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

// Packed sequences as padded batches.
namespace posenc::blockwise {

/// Maps tokens of packed tensors `[T, ...]` to a padded batch `[n, max_len, ...]` of some of their sequences. It forms
/// no index beyond the tensors, whatever values `cu_seqlens` has.
class Packing {
 public:
  /// @param begins,lengths  int64 `[n]`: first token and length of each sequence of the batch.
  /// @param rows  int64 `[T]`: the row of each token in the batch, `sequence * max_len + offset`; -1 for tokens that
  ///   are not in the batch.
  Packing(const at::Tensor& begins, const at::Tensor& lengths, const at::Tensor& rows, int64_t max_len);

  /// The lengths of the sequences of the batch, int64 `[n]`.
  const at::Tensor& seqlens() const { return seqlens_; }

  /// Whether the batch is one sequence of all tokens, in packed tensors on a CPU. Nothing is copied then.
  bool is_whole() const { return is_whole_; }

  /// `packed` as `[n, max_len, ...]`, with zeros past the length of each sequence: a copy, or a view if `is_whole()`.
  at::Tensor pad(const at::Tensor& packed) const;

  /// Copies the rows of `padded` to their tokens in `packed`. Other tokens keep their values.
  void unpad(const at::Tensor& padded, const at::Tensor& packed) const;

 private:
  int64_t max_len_;
  bool is_whole_ = false;
  at::Tensor seqlens_;
  at::Tensor sources_;  // int64 [n * max_len]: the token of each row
  at::Tensor behind_;   // bool [n, max_len]: rows past the length of their sequence
  at::Tensor rows_;     // the row of each token of `tokens_`, or of all tokens if `tokens_` is undefined
  at::Tensor tokens_;   // the tokens of the batch; defined on a CPU only
  at::Tensor others_;   // bool [T]: tokens that are not in the batch; defined on other devices only
};

/// Divides the sequences of a packed call into padded batches of similar length. A batch has the lengths above L / 2
/// and up to L, for L = 1, 2, 4, .... Memory therefore grows with the number of tokens, not with the number of
/// sequences times the longest of them.
///
/// On a CPU the host reads the lengths. A batch has one entry for each of its sequences, and separate L for queries and
/// keys. On other devices the host does not wait for the lengths, and L >= 2 bounds the longer of queries and keys. T
/// tokens contain at most `2 T / L` sequences of the batch for L, so it has about that many entries, some of them
/// empty. If padding all sequences to `max_seqlen` takes at most twice the tokens, all sequences are one batch.
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

  /// Maps tensors `[N, ...]` with one row for each sequence to the sequences of a batch, `[n, 1, ...]`, with zeros for
  /// empty entries.
  Packing sequences(size_t i) const;

  /// Bool `[Tq]` and `[Tk]`: the tokens of sequences that are longer than `max_seqlen` or not within the tensors.
  /// Undefined on a CPU, where such lengths are errors.
  const at::Tensor& invalid_q() const { return broken_q_; }
  const at::Tensor& invalid_k() const { return broken_k_; }
  /// Bool `[N]`: these sequences.
  const at::Tensor& invalid_sequences() const { return broken_; }

 private:
  /// All sequences of queries or of keys.
  struct Sequences {
    at::Tensor begins, lengths;   // int64 [N]
    at::Tensor sequence, offset;  // int64 [T]: of each token; offset is -1 for a token in no sequence
    at::Tensor broken;            // bool [N]: longer than `max_seqlen` or not within the tensor; undefined on a CPU

    Sequences(const at::Tensor& cu_seqlens, int64_t tokens, int64_t max_len);
  };

  /// One batch: sequences `order_[first]` to `order_[first + count - 1]`.
  struct Extent {
    at::Tensor first, count;  // int64 [1]
    int64_t entries;          // at least `count`
    int64_t q_len, k_len;     // at least the longest sequence of the batch
  };

  void divide_on_cpu();
  void divide_by_capacity(int64_t q_len, int64_t k_len);
  Packing packing(const Sequences& of, const Extent& extent, int64_t max_len) const;
  /// Int64 `[n]`: the sequence of each entry of a batch, any sequence for empty entries. Bool `[n]`: the empty entries.
  std::pair<at::Tensor, at::Tensor> entries(const Extent& extent) const;
  /// The entry of sequences given by their index in `order_`, or -1 if they are not in the batch.
  static at::Tensor entries_of_ranks(const at::Tensor& ranks, const Extent& extent);

  int64_t q_tokens_, k_tokens_;
  Sequences of_q_, of_k_;
  at::Tensor broken_, broken_q_, broken_k_;
  at::Tensor order_;  // int64 [N]: sequences in the order of the batches; undefined: one batch, unchanged order
  at::Tensor rank_;   // int64 [N]: the index of each sequence in `order_`
  std::vector<Extent> extents_;
};

}  // namespace posenc::blockwise
