#include <posenc/reference.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/rsqrt.h>

namespace posenc::reference {
namespace {

using at::Tensor;

Tensor normalised(const Tensor& x, const Tensor& weight, const Tensor& table, double eps, bool unit_offset) {
  const Tensor wide = x.to(table.scalar_type());
  const Tensor w = weight.to(table.scalar_type());
  const Tensor rstd = at::rsqrt((wide * wide).mean(-1, /*keepdim=*/true) + eps);
  return wide * rstd * (unit_offset ? w + 1 : w);
}

}  // namespace

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding(
    const Tensor& q,
    const Tensor& k,
    const Tensor& q_weight,
    const Tensor& k_weight,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    double eps,
    bool unit_offset,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const auto of_one = [&](const Tensor& x, const Tensor& weight) {
    return reference::rotary_embedding(
               normalised(x, weight, cos, eps, unit_offset), cos, sin, positions, interleaved, conjugate, pair_axes)
        .to(x.scalar_type());
  };
  return {of_one(q, q_weight), of_one(k, k_weight)};
}

}  // namespace posenc::reference
