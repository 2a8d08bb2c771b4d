#include <arguments/rotary_embedding_qkv.h>
#include <meta/detail/symbolic.h>
#include <ops/dispatch.h>
#include <ops/rotary_embedding.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

namespace posenc {
namespace {

using arguments::RotatedList;
using at::Tensor;

/// `check_arguments(op, rotation, inputs)` where all sizes are numbers.
template <typename Check>
void check(const Check& check_arguments, const char* op, const Rotation& rotation, RotatedList inputs) {
  const bool symbolic = meta::any_symbol(rotation) ||
      std::any_of(inputs.begin(), inputs.end(), [](const auto& input) { return meta::is_symbol(input.tensor); });
  if (!symbolic) {
    check_arguments(op, rotation, inputs);
  }
}

Tensor rotary_embedding_meta(const Rotation& rotation, const Tensor& x) {
  check(arguments::check_rotary, "posenc::rotary_embedding", rotation, {{"x", x}});
  return at::empty_like(x);
}

std::tuple<Tensor, Tensor> rotary_embedding_qk_meta(const Rotation& rotation, const Tensor& q, const Tensor& k) {
  check(arguments::check_rotary, "posenc::rotary_embedding_qk", rotation, {{"q", q}, {"k", k}});
  return {at::empty_like(q), at::empty_like(k)};
}

void rotary_embedding_meta_(const Rotation& rotation, Tensor& x) {
  check(arguments::check_rotary_in_place, "posenc::rotary_embedding_", rotation, {{"x", x}});
}

void rotary_embedding_qk_meta_(const Rotation& rotation, Tensor& q, Tensor& k) {
  check(arguments::check_rotary_in_place, "posenc::rotary_embedding_qk_", rotation, {{"q", q}, {"k", k}});
}

std::tuple<Tensor, Tensor, Tensor> rotary_embedding_qkv_meta(
    const Rotation& rotation,
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads) {
  constexpr const char* kOp = "posenc::rotary_embedding_qkv";
  arguments::check_head_counts(kOp, num_q_heads, num_kv_heads);
  if (!meta::any_symbol(qkv, rotation)) {
    const arguments::PackedViews views = arguments::packed_views(kOp, "qkv", qkv, num_q_heads, num_kv_heads);
    arguments::check_rotary(kOp, rotation, {{"qkv", views.q}, {"qkv", views.k}});
  }
  const bool stacked = arguments::is_stacked(qkv.dim());
  const c10::SymInt head_dim =
      stacked ? qkv.sym_size(-1) : qkv.sym_size(-1) / c10::SymInt(num_q_heads + 2 * num_kv_heads);
  const auto output = [&](int64_t num_heads) {
    std::vector<c10::SymInt> sizes = qkv.sym_sizes().slice(0, qkv.dim() - (stacked ? 3 : 1)).vec();
    sizes.emplace_back(num_heads);
    sizes.push_back(head_dim);
    return at::empty_symint(sizes, qkv.options());
  };
  return {output(num_q_heads), output(num_kv_heads), output(num_kv_heads)};
}

Tensor rotary_embedding_pack_meta(const PackRotation& rotation, const Tensor& q, const Tensor& k, const Tensor& v) {
  if (!meta::any_symbol(q, k, v, rotation)) {
    arguments::check_rotary_pack("posenc::rotary_embedding_pack", rotation, {q, k, v});
  }
  std::vector<c10::SymInt> sizes = q.sym_sizes().slice(0, q.dim() - 2).vec();
  if (rotation.stacked) {
    sizes.emplace_back(3);
    sizes.push_back(q.sym_size(-2));
    sizes.push_back(q.sym_size(-1));
  } else {
    sizes.push_back((q.sym_size(-2) + k.sym_size(-2) * 2) * q.sym_size(-1));
  }
  return at::empty_symint(sizes, q.options());
}

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_meta(
    const Rotation& rotation,
    at::TensorList /*grads*/,
    at::TensorList /*inputs*/) {
  const auto gradient = [&] { return at::empty_like(rotation.cos, at::MemoryFormat::Contiguous); };
  return {gradient(), gradient()};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_embedding", kernel<rotary_embedding_meta>);
  m.impl("rotary_embedding_", kernel<rotary_embedding_meta_>);
  m.impl("rotary_embedding_qk", kernel<rotary_embedding_qk_meta>);
  m.impl("rotary_embedding_qk_", kernel<rotary_embedding_qk_meta_>);
  m.impl("rotary_embedding_qkv", kernel<rotary_embedding_qkv_meta>);
  m.impl("rotary_embedding_pack", kernel<rotary_embedding_pack_meta>);
  m.impl("rotary_embedding_tables_backward", kernel<rotary_embedding_tables_backward_meta>);
}

}  // namespace posenc
