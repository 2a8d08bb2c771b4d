#include <arguments/qk_norm_rotary_embedding.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

bool any_symbolic(const QKNormRotation& a, const Tensor& q, const Tensor& k) {
  const Rotation& rotation = a.rotation;
  return meta::any_symbolic({q, k, a.q_weight, a.k_weight, rotation.cos, rotation.sin}) ||
      (rotation.positions.has_value() && meta::has_symbolic_sizes(*rotation.positions));
}

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding_meta(
    const QKNormRotation& rotation,
    const Tensor& q,
    const Tensor& k) {
  if (!any_symbolic(rotation, q, k)) {
    arguments::check_qk_norm_rotary("posenc::qk_norm_rotary_embedding", rotation, q, k);
  }
  return {at::empty_like(q), at::empty_like(k)};
}

QKNormRotaryGradients qk_norm_rotary_embedding_backward_meta(
    const QKNormRotation& rotation,
    const QKNormRotaryGradInputs& inputs) {
  if (!any_symbolic(rotation, inputs.q, inputs.k)) {
    arguments::check_qk_norm_rotary_backward(rotation, inputs);
  }
  return arguments::allocate_qk_norm_rotary_gradients(rotation, inputs);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("qk_norm_rotary_embedding", qk_norm_rotary_kernel<qk_norm_rotary_embedding_meta>);
  m.impl("qk_norm_rotary_embedding_backward", qk_norm_rotary_backward_kernel<qk_norm_rotary_embedding_backward_meta>);
}

}  // namespace posenc
