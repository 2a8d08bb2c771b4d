#include <contract/qk_norm_rotary_embedding.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>

namespace posenc {
namespace {

using at::Tensor;
using contract::QKNormRotaryArguments;

bool any_symbolic(const QKNormRotaryArguments& a) {
  const std::initializer_list<Tensor> tensors{
      a.q, a.k, a.q_weight, a.k_weight, a.rotary.cos, a.rotary.sin, a.rotary.positions.value_or(Tensor())};
  return std::any_of(tensors.begin(), tensors.end(), meta::has_symbolic_sizes);
}

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding_meta(
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
  const QKNormRotaryArguments arguments{
      {"posenc::qk_norm_rotary_embedding", cos, sin, positions, interleaved, conjugate, pair_axes},
      q,
      k,
      q_weight,
      k_weight,
      eps,
      unit_offset};
  if (!any_symbolic(arguments)) {
    contract::check_qk_norm_rotary(arguments);
  }
  return {at::empty_like(q), at::empty_like(k)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rotary_embedding_backward_meta(
    const std::optional<Tensor>& grad_q,
    const std::optional<Tensor>& grad_k,
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
    at::IntArrayRef pair_axes,
    bool weights_grad) {
  const QKNormRotaryArguments arguments{
      {"posenc::qk_norm_rotary_embedding_backward", cos, sin, positions, interleaved, conjugate, pair_axes},
      q,
      k,
      q_weight,
      k_weight,
      eps,
      unit_offset};
  if (!any_symbolic(arguments)) {
    contract::check_qk_norm_rotary_backward(arguments, grad_q, grad_k);
  }
  const auto gradients = contract::allocate_qk_norm_rotary_gradients(arguments, grad_q, grad_k, weights_grad);
  return {gradients.q, gradients.k, gradients.q_weight, gradients.k_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("qk_norm_rotary_embedding", qk_norm_rotary_embedding_meta);
  m.impl("qk_norm_rotary_embedding_backward", qk_norm_rotary_embedding_backward_meta);
}

}  // namespace posenc
