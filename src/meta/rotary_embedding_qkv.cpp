#include <contract/rotary_embedding_qkv.h>
#include <meta/detail/rotary_symbolic.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using meta::any_symbolic;
using meta::has_symbolic_sizes;

std::tuple<Tensor, Tensor, Tensor> rotary_embedding_qkv_meta(
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  constexpr const char* kOp = "posenc::rotary_embedding_qkv";
  const contract::RotaryArguments arguments{kOp, cos, sin, positions, interleaved, conjugate, pair_axes};
  contract::check_head_counts(kOp, num_q_heads, num_kv_heads);
  if (!has_symbolic_sizes(qkv) && !any_symbolic(arguments)) {
    const contract::PackedViews views = contract::packed_views(kOp, "qkv", qkv, num_q_heads, num_kv_heads);
    const contract::Rotated k{"qkv", views.k};
    contract::check_rotary(arguments, {"qkv", views.q}, &k);
  }
  const bool stacked = contract::is_stacked(qkv.dim());
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

Tensor rotary_embedding_pack_meta(
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
  const contract::RotaryArguments arguments{
      "posenc::rotary_embedding_pack", cos, sin, positions, interleaved, conjugate, pair_axes};
  if (!has_symbolic_sizes(q) && !has_symbolic_sizes(k) && !has_symbolic_sizes(v) && !any_symbolic(arguments)) {
    contract::check_rotary_pack(arguments, {q, k, v}, stacked);
  }
  std::vector<c10::SymInt> sizes = q.sym_sizes().slice(0, q.dim() - 2).vec();
  if (stacked) {
    sizes.emplace_back(3);
    sizes.push_back(q.sym_size(-2));
    sizes.push_back(q.sym_size(-1));
  } else {
    sizes.push_back((q.sym_size(-2) + k.sym_size(-2) * 2) * q.sym_size(-1));
  }
  return at::empty_symint(sizes, q.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_embedding_qkv", rotary_embedding_qkv_meta);
  m.impl("rotary_embedding_pack", rotary_embedding_pack_meta);
}

}  // namespace posenc
