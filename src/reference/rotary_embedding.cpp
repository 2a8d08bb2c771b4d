#include <posenc/reference.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <limits>

namespace posenc::reference {
namespace {

using at::Tensor;

/// The row of the tables that each pair of each token reads, `[B, S, R/2]`, `[S, R/2]` or `[T, R/2]`; one column if
/// positions have one axis.
Tensor row_indices(const Tensor& positions, at::IntArrayRef pair_axes) {
  if (pair_axes.empty()) {
    return positions.to(at::kLong).unsqueeze(-1);
  }
  const Tensor axes = at::tensor(pair_axes, at::kLong).to(positions.device());
  return positions.to(at::kLong).index_select(0, axes).movedim(0, -1);
}

/// The entries of a table for each token, as `[B, S, 1, R/2]` or `[T, 1, R/2]`, which broadcast over heads. NaN if the
/// table has no such row.
Tensor rows_of_tokens(const Tensor& table, const std::optional<Tensor>& indices, int64_t seq_len) {
  if (!indices.has_value()) {
    return table.narrow(-2, 0, seq_len).unsqueeze(-2);
  }
  auto sizes = indices->sizes().vec();
  sizes.back() = table.size(-1);
  const Tensor index = indices->expand(sizes);
  const Tensor exists = index.ge(0).logical_and(index.lt(table.size(0)));
  const Tensor rows =
      table.gather(0, index.masked_fill(exists.logical_not(), 0).reshape({-1, table.size(-1)})).view(sizes);
  return rows.masked_fill(exists.logical_not(), std::numeric_limits<double>::quiet_NaN()).unsqueeze(-2);
}

}  // namespace

Tensor rotary_embedding(
    const Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const int64_t pairs = cos.size(-1);
  const int64_t seq_len = x.size(-3);
  const std::optional<Tensor> indices =
      positions.has_value() ? std::optional(row_indices(*positions, pair_axes)) : std::nullopt;
  const Tensor c = rows_of_tokens(cos, indices, seq_len);
  const Tensor s = conjugate ? -rows_of_tokens(sin, indices, seq_len) : rows_of_tokens(sin, indices, seq_len);

  const Tensor wide = x.to(cos.scalar_type());
  const Tensor rotated = wide.narrow(-1, 0, 2 * pairs);
  Tensor tail = wide.narrow(-1, 2 * pairs, x.size(-1) - 2 * pairs);
  if (indices.has_value() && pair_axes.empty()) {  // a token outside the tables is NaN in all channels
    const Tensor outside = indices->lt(0).logical_or(indices->ge(cos.size(0))).unsqueeze(-1);
    tail = tail.masked_fill(outside, std::numeric_limits<double>::quiet_NaN());
  }
  const Tensor x1 = interleaved ? rotated.slice(-1, 0, {}, 2) : rotated.narrow(-1, 0, pairs);
  const Tensor x2 = interleaved ? rotated.slice(-1, 1, {}, 2) : rotated.narrow(-1, pairs, pairs);
  const Tensor y1 = x1 * c - x2 * s;
  const Tensor y2 = x1 * s + x2 * c;
  const Tensor y = interleaved ? at::stack({y1, y2}, -1).flatten(-2) : at::cat({y1, y2}, -1);
  return at::cat({y, tail}, -1).to(x.scalar_type());
}

std::tuple<Tensor, Tensor> rotary_embedding_qk(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  return {
      reference::rotary_embedding(q, cos, sin, positions, interleaved, conjugate, pair_axes),
      reference::rotary_embedding(k, cos, sin, positions, interleaved, conjugate, pair_axes)};
}

std::tuple<Tensor, Tensor, Tensor> rotary_embedding_qkv(
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const int64_t num_heads = num_q_heads + 2 * num_kv_heads;
  const bool stacked = qkv.dim() >= 4;
  const Tensor heads = stacked ? qkv.flatten(-3, -2) : qkv.unflatten(-1, {num_heads, qkv.size(-1) / num_heads});
  const auto rotated = [&](const Tensor& x) {
    return reference::rotary_embedding(x, cos, sin, positions, interleaved, conjugate, pair_axes);
  };
  return {
      rotated(heads.narrow(-2, 0, num_q_heads)), rotated(heads.narrow(-2, num_q_heads, num_kv_heads)),
      heads.narrow(-2, num_q_heads + num_kv_heads, num_kv_heads).clone()};
}

Tensor rotary_embedding_pack(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool stacked,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const auto rotated = [&](const Tensor& x) {
    return reference::rotary_embedding(x, cos, sin, positions, interleaved, conjugate, pair_axes);
  };
  return stacked ? at::stack({rotated(q), rotated(k), v}, -3) : at::cat({rotated(q), rotated(k), v}, -2).flatten(-2);
}

}  // namespace posenc::reference
