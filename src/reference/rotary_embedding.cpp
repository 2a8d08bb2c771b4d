#include <posenc/reference.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

namespace posenc::reference {
namespace {

using at::Tensor;

/// The table row of every token, as `[B, S, 1, R/2]` or `[T, 1, R/2]`, to multiply all heads with.
Tensor rows_of_tokens(const Tensor& table, const std::optional<Tensor>& positions, int64_t seq_len) {
  if (positions.has_value()) {
    auto sizes = positions->sizes().vec();
    sizes.push_back(table.size(-1));
    return table.index_select(0, positions->flatten()).view(sizes).unsqueeze(-2);
  }
  return table.narrow(-2, 0, seq_len).unsqueeze(-2);
}

}  // namespace

Tensor rotary_embedding(
    const Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate) {
  const int64_t pairs = cos.size(-1);
  const int64_t seq_len = x.size(-3);
  const Tensor c = rows_of_tokens(cos, positions, seq_len);
  const Tensor s = conjugate ? -rows_of_tokens(sin, positions, seq_len) : rows_of_tokens(sin, positions, seq_len);

  const Tensor wide = x.to(cos.scalar_type());
  const Tensor rotated = wide.narrow(-1, 0, 2 * pairs);
  const Tensor tail = wide.narrow(-1, 2 * pairs, x.size(-1) - 2 * pairs);
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
    bool conjugate) {
  return {
      reference::rotary_embedding(q, cos, sin, positions, interleaved, conjugate),
      reference::rotary_embedding(k, cos, sin, positions, interleaved, conjugate)};
}

}  // namespace posenc::reference
