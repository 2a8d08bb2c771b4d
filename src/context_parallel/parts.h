#pragma once

#include <arguments/alibi_attention.h>
#include <context_parallel/group.h>

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

// The calls of attention that one rank computes. The sequence is divided into 2 C chunks, C the number of ranks; rank r
// has chunks r and 2 C - 1 - r, the halves of its tokens. The two are not adjacent in the sequence.
namespace posenc::context_parallel {

/// The tokens of one rank.
struct Shard {
  arguments::AlibiAttention call;
  Group group;

  int64_t ranks() const { return group->getSize(); }
  int64_t rank() const { return group->getRank(); }
  int64_t half_len() const { return call.q_len / 2; }
  bool empty() const { return call.batch * call.q_len * call.q_heads == 0; }

  /// Half 0 or 1 of the tokens of `x`, which are in dimension `dim`; a view.
  at::Tensor half(const at::Tensor& x, int64_t dim, int64_t half) const {
    return x.narrow(dim, half * half_len(), half_len());
  }

  /// The options of a call without positions.
  arguments::SymbolicAttentionOptions options() const;

  /// The rank whose k and v this rank computes with in step `step`, 0 to C - 1. In step 0 they are its own. After each
  /// step every rank sends the k and v that it holds to the next rank, and receives those of the previous rank.
  int64_t source(int64_t step) const { return (rank() - step + ranks()) % ranks(); }
};

/// `count` halves of the tokens, from half `first` on.
struct Halves {
  int64_t first, count;
};

/// A call with some of the queries and some of the keys that a rank holds. Its distances are those of the sequence
/// plus a number for each half of the queries, so one call can serve both halves.
class Part {
 public:
  /// @param query_offset  position of the first query of the call relative to its first key, in tokens. All keys of the
  ///     call are before all queries or after all of them, except in `diagonal`.
  /// @param beyond  for each half of the queries, the distance in the sequence minus the distance in the call, in
  ///     tokens, not negative. It is the same for all keys of a row. The scores of the sequence are therefore those of
  ///     the call minus `slope * beyond`: the softmax of the row is the same, and its log-sum-exp is smaller by
  ///     `slope * beyond`.
  Part(const Shard& shard, Halves queries, Halves keys, int64_t query_offset, std::array<int64_t, 2> beyond);

  /// The call of each half of the queries with the same half of the keys of one rank. Halves are sequences of the
  /// call.
  static Part diagonal(const Shard& shard);

  const arguments::SymbolicAttentionOptions& options() const { return options_; }

  /// Rows of `x`, `[B, S / C, H, D]`, in the shape of the call: those of queries, those of keys.
  at::Tensor queries_of(const at::Tensor& x) const { return rows_of(x, queries_); }
  at::Tensor keys_of(const at::Tensor& x) const { return rows_of(x, keys_); }
  std::optional<at::Tensor> slopes_of(const std::optional<at::Tensor>& slopes) const;

  /// Calls `body(half, rows)` for each half of the queries, or of the keys, with its rows of `x`, which is of their
  /// shape in the call. `rows` is `[B, S / 2 C, H, D]`, a view.
  template <typename Body>
  void for_each_query_half(const at::Tensor& x, const Body& body) const {
    for_each_half(unfolded_rows(x), queries_, body);
  }
  template <typename Body>
  void for_each_key_half(const at::Tensor& x, const Body& body) const {
    for_each_half(unfolded_rows(x), keys_, body);
  }

  /// The log-sum-exp of the sequence's scores, `[B, Hq, S / C]`, as one of the scores of the call.
  at::Tensor lse_of_call(const at::Tensor& lse, const std::optional<at::Tensor>& slopes) const;

  /// Numbers of rows, `[B, Hq, S / C]`, in the shape of the call.
  at::Tensor numbers_of(const at::Tensor& x) const;

  /// Adds the sums of `alibi_attention_slope_sums` of the call to those of all keys, `[4, B, Hq, S / C]`.
  void add_slope_sums(const at::Tensor& total, const at::Tensor& of_call) const;

  /// The inverse of `lse_of_call` for half `half` of the queries, `[B, Hq, S / 2 C]`.
  at::Tensor lse_of_half(const at::Tensor& of_call, const std::optional<at::Tensor>& slopes, int64_t half) const;

 private:
  template <typename Body>
  void for_each_half(const at::Tensor& rows, Halves halves, const Body& body) const {
    for (int64_t i = 0; i < halves.count; ++i) {
      body(halves.first + i, rows.narrow(1, i * half_len_, half_len_));
    }
  }
  at::Tensor rows_of(const at::Tensor& x, Halves halves) const;
  at::Tensor unfolded_rows(const at::Tensor& x) const;
  at::Tensor unfolded_numbers(const at::Tensor& x) const;
  static at::Tensor shifted(const at::Tensor& lse, const std::optional<at::Tensor>& slopes, int64_t tokens);

  Halves queries_, keys_;
  arguments::SymbolicAttentionOptions options_;
  std::array<int64_t, 2> beyond_;  // of each half in `queries_`
  int64_t half_len_;
  bool folded_ = false;  // whether halves are sequences of the call
};

/// The parts of the queries of this rank and the keys of rank `source` that the causal mask does not hide. Those of the
/// keys of this rank end with the diagonal part.
std::vector<Part> visible_parts(const Shard& shard, int64_t source);

}  // namespace posenc::context_parallel
