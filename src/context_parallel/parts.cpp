#include <context_parallel/parts.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>

#include <cstdlib>

namespace posenc::context_parallel {
namespace {

using at::Tensor;

/// `[B, 2 S, ..]` as `[2 B, S, ..]`: a view where strides allow it.
Tensor folded_rows(const Tensor& x) {
  return x.unflatten(1, {2, x.size(1) / 2}).flatten(0, 1);
}

}  // namespace

arguments::SymbolicAttentionOptions Shard::options() const {
  arguments::SymbolicAttentionOptions result;
  result.scale = call.scale;
  result.causal = call.causal;
  return result;
}

Part::Part(const Shard& shard, Halves queries, Halves keys, int64_t query_offset, std::array<int64_t, 2> beyond)
    : queries_(queries), keys_(keys), options_(shard.options()), beyond_(beyond), half_len_(shard.half_len()) {
  options_.causal = false;  // the queries see all keys
  options_.query_offset = query_offset;
}

Part Part::diagonal(const Shard& shard) {
  Part result(shard, {0, 2}, {0, 2}, /*query_offset=*/0, /*beyond=*/{0, 0});
  result.options_.causal = shard.call.causal;
  result.folded_ = true;
  return result;
}

std::optional<Tensor> Part::slopes_of(const std::optional<Tensor>& slopes) const {
  return folded_ && slopes.has_value() && slopes->dim() == 2 ? slopes->repeat_interleave(2, 0) : slopes;
}

Tensor Part::rows_of(const Tensor& x, Halves halves) const {
  return folded_ ? folded_rows(x) : x.narrow(1, halves.first * half_len_, halves.count * half_len_);
}

Tensor Part::unfolded_rows(const Tensor& x) const {
  return folded_ ? x.unflatten(0, {x.size(0) / 2, 2}).flatten(1, 2) : x;
}

Tensor Part::numbers_of(const Tensor& x) const {
  if (folded_) {
    return x.unflatten(-1, {2, half_len_}).transpose(1, 2).flatten(0, 1);
  }
  return x.narrow(-1, queries_.first * half_len_, queries_.count * half_len_);
}

Tensor Part::unfolded_numbers(const Tensor& x) const {
  const int64_t batch = x.dim() - 3;
  return folded_ ? x.unflatten(batch, {x.size(batch) / 2, 2}).transpose(batch + 1, batch + 2).flatten(-2, -1) : x;
}

Tensor Part::shifted(const Tensor& lse, const std::optional<Tensor>& slopes, int64_t tokens) {
  return tokens == 0 || !slopes.has_value() ? lse : lse + slopes->to(lse.scalar_type()).unsqueeze(-1) * tokens;
}

Tensor Part::lse_of_call(const Tensor& lse, const std::optional<Tensor>& slopes) const {
  const Tensor sums = numbers_of(lse);
  if (beyond_[0] == beyond_[1] || queries_.count == 1) {
    return shifted(sums, slopes, beyond_[0]);
  }
  return at::cat(
      {shifted(sums.narrow(-1, 0, half_len_), slopes, beyond_[0]),
       shifted(sums.narrow(-1, half_len_, half_len_), slopes, beyond_[1])},
      -1);
}

Tensor Part::lse_of_half(const Tensor& of_call, const std::optional<Tensor>& slopes, int64_t half) const {
  const int64_t i = half - queries_.first;
  return shifted(unfolded_numbers(of_call).narrow(-1, i * half_len_, half_len_), slopes, -beyond_[i]);
}

void Part::add_slope_sums(const Tensor& total, const Tensor& of_call) const {
  const Tensor sums = unfolded_numbers(of_call);
  total.narrow(-1, queries_.first * half_len_, queries_.count * half_len_).add_(sums);
  for (int64_t i = 0; i < queries_.count; ++i) {
    if (beyond_[i] != 0) {
      const Tensor rows = total.narrow(-1, (queries_.first + i) * half_len_, half_len_);
      const Tensor terms = sums.narrow(-1, i * half_len_, half_len_);
      rows.select(0, 1).add_(terms.select(0, 0), beyond_[i]);
      rows.select(0, 3).add_(terms.select(0, 2), beyond_[i]);
    }
  }
}

std::vector<Part> visible_parts(const Shard& shard, int64_t source) {
  const int64_t ranks = shard.ranks();
  const int64_t rank = shard.rank();
  const int64_t half_len = shard.half_len();
  const auto chunk = [ranks](int64_t of_rank, int64_t half) { return half == 0 ? of_rank : 2 * ranks - 1 - of_rank; };
  std::vector<Part> parts;
  // Queries and keys that are chunks on different sides of a boundary. Adjacent chunks are computed at their distance,
  // others as if they were adjacent: cuDNN builds a plan for each query offset, and this way there are few.
  const auto add = [&](Halves queries, Halves keys) {
    const bool before = chunk(rank, queries.first) < chunk(source, keys.first);  // queries before keys
    if (before && shard.call.causal) {
      return;
    }
    // Chunks between the first query of a half and the nearest key, less those of the call.
    const auto beyond = [&](int64_t i) {
      const int64_t of_query = chunk(rank, queries.first + i);
      const int64_t nearest = chunk(source, before ? keys.first : keys.first + keys.count - 1);
      const int64_t as_computed = before ? i - queries.count : i + 1;
      return std::abs(of_query - nearest - as_computed) * half_len;
    };
    const int64_t offset = (before ? -queries.count : keys.count) * half_len;
    parts.emplace_back(
        shard, queries, keys, offset, std::array<int64_t, 2>{beyond(0), queries.count == 2 ? beyond(1) : 0});
  };
  if (source == rank) {
    add({1, 1}, {0, 1});
    add({0, 1}, {1, 1});
    parts.push_back(Part::diagonal(shard));
  } else if (source < rank) {
    // Both halves of the queries are between the halves of the keys.
    add({0, 2}, {0, 1});
    add({0, 2}, {1, 1});
  } else if (source == ranks - 1) {
    // The halves of the keys are adjacent, between the halves of the queries.
    add({1, 1}, {0, 2});
    add({0, 1}, {0, 2});
  } else {
    for (int64_t k_half = 0; k_half < 2; ++k_half) {
      add({1, 1}, {k_half, 1});
      add({0, 1}, {k_half, 1});
    }
  }
  return parts;
}

}  // namespace posenc::context_parallel
