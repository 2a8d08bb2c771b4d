#include <ops/qk_norm_rotary_embedding.h>

#include <ops/dispatch.h>
#include <posenc/qk_norm_rotary_embedding.h>

#include <torch/library.h>

#include <utility>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "qk_norm_rotary_embedding(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
      "Tensor? positions=None, *, float eps=1e-6, bool unit_offset=False, bool interleaved=False, "
      "bool conjugate=False, int[] pair_axes=[]) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "qk_norm_rotary_embedding_backward(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor k, Tensor q_weight, "
      "Tensor k_weight, Tensor cos, Tensor sin, Tensor? positions=None, *, float eps=1e-6, bool unit_offset=False, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[], bool weights_grad=True) -> (Tensor, Tensor, "
      "Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

namespace dispatch {

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding(const QKNormRotation& a, const Tensor& q, const Tensor& k) {
  static const auto op =
      find_operator<decltype(qk_norm_rotary_kernel<&qk_norm_rotary_embedding>)>("posenc::qk_norm_rotary_embedding");
  const Rotation& r = a.rotation;
  return op.call(
      q, k, a.q_weight, a.k_weight, r.cos, r.sin, r.positions, a.eps, a.unit_offset, r.interleaved, r.conjugate,
      r.pair_axes);
}

QKNormRotaryGradients qk_norm_rotary_embedding_backward(const QKNormRotation& a, const QKNormRotaryGradInputs& in) {
  static const auto op = find_operator<decltype(qk_norm_rotary_backward_kernel<&qk_norm_rotary_embedding_backward>)>(
      "posenc::qk_norm_rotary_embedding_backward");
  const Rotation& r = a.rotation;
  auto [dq, dk, dq_weight, dk_weight] = op.call(
      in.grad_q, in.grad_k, in.q, in.k, a.q_weight, a.k_weight, r.cos, r.sin, r.positions, a.eps, a.unit_offset,
      r.interleaved, r.conjugate, r.pair_axes, in.weights_grad);
  return {std::move(dq), std::move(dk), std::move(dq_weight), std::move(dk_weight)};
}

}  // namespace dispatch

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
  return dispatch::qk_norm_rotary_embedding(
      {{cos, sin, positions, interleaved, conjugate, pair_axes}, q_weight, k_weight, eps, unit_offset}, q, k);
}

}  // namespace posenc
