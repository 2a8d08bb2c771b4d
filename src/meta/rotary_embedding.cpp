#include <contract/rotary_embedding.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;
using contract::RotaryArguments;
using contract::Rotated;
using meta::has_symbolic_sizes;

void check(const RotaryArguments& arguments, const Rotated& q, const Rotated* k) {
  const bool symbolic = has_symbolic_sizes(q.tensor) || (k != nullptr && has_symbolic_sizes(k->tensor)) ||
      has_symbolic_sizes(arguments.cos) || has_symbolic_sizes(arguments.sin) ||
      (arguments.positions.has_value() && has_symbolic_sizes(*arguments.positions));
  if (!symbolic) {
    contract::check_rotary(arguments, q, k);
  }
}

Tensor rotary_embedding_meta(
    const Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  check({"posenc::rotary_embedding", cos, sin, positions, interleaved, conjugate, pair_axes}, {"x", x}, nullptr);
  return at::empty_like(x);
}

std::tuple<Tensor, Tensor> rotary_embedding_qk_meta(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const Rotated rotated_k{"k", k};
  check({"posenc::rotary_embedding_qk", cos, sin, positions, interleaved, conjugate, pair_axes}, {"q", q}, &rotated_k);
  return {at::empty_like(q), at::empty_like(k)};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_embedding", rotary_embedding_meta);
  m.impl("rotary_embedding_qk", rotary_embedding_qk_meta);
}

}  // namespace posenc
