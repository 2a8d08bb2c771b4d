#include <contract/rotary_embedding.h>
#include <meta/detail/rotary_symbolic.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;
using contract::RotaryArguments;
using contract::Rotated;
using meta::any_symbolic;

void check(const RotaryArguments& arguments, const Rotated& q, const Rotated* k) {
  if (!any_symbolic(arguments) && !any_symbolic(q) && (k == nullptr || !any_symbolic(*k))) {
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

void check_in_place(const RotaryArguments& arguments, const Rotated& q, const Rotated* k) {
  if (!any_symbolic(arguments) && !any_symbolic(q) && (k == nullptr || !any_symbolic(*k))) {
    contract::check_rotary_in_place(arguments, q, k);
  }
}

void rotary_embedding_meta_(
    Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  check_in_place(
      {"posenc::rotary_embedding_", cos, sin, positions, interleaved, conjugate, pair_axes}, {"x", x}, nullptr);
}

void rotary_embedding_qk_meta_(
    Tensor& q,
    Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const Rotated rotated_k{"k", k};
  check_in_place(
      {"posenc::rotary_embedding_qk_", cos, sin, positions, interleaved, conjugate, pair_axes}, {"q", q}, &rotated_k);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_embedding", rotary_embedding_meta);
  m.impl("rotary_embedding_", rotary_embedding_meta_);
  m.impl("rotary_embedding_qk", rotary_embedding_qk_meta);
  m.impl("rotary_embedding_qk_", rotary_embedding_qk_meta_);
}

}  // namespace posenc
