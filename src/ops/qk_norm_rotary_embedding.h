#pragma once

#include <ops/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

// `qk_norm_rotary_embedding` and its backward below the dispatcher: their common arguments are one struct.
namespace posenc {

/// The arguments that both have beside q, k and gradients, as `posenc/qk_norm_rotary_embedding.h` documents them.
struct QKNormRotation {
  Rotation rotation;
  const at::Tensor& q_weight;
  const at::Tensor& k_weight;
  double eps;
  bool unit_offset;
};

/// An implementation `kFunction(const QKNormRotation&, q, k)` with the C++ signature of the schema.
template <auto kFunction>
std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_kernel(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& q_weight,
    const at::Tensor& k_weight,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    double eps,
    bool unit_offset,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  return kFunction(
      {{cos, sin, positions, interleaved, conjugate, pair_axes}, q_weight, k_weight, eps, unit_offset}, q, k);
}

/// The gradients of q, k, q_weight and k_weight, each of the shape and dtype of that tensor. Those of q and q_weight
/// are undefined where `grad_q` is absent, those of k and k_weight where `grad_k` is. Those of the weights are
/// undefined unless `weights_grad`.
struct QKNormRotaryGradients {
  at::Tensor q, k, q_weight, k_weight;
};

/// The arguments of `qk_norm_rotary_embedding_backward` beside `QKNormRotation`.
struct QKNormRotaryGradInputs {
  const std::optional<at::Tensor>& grad_q;  // of the outputs; nullopt or undefined means zero
  const std::optional<at::Tensor>& grad_k;
  const at::Tensor& q;
  const at::Tensor& k;
  bool weights_grad;  // whether dq_weight and dk_weight are asked for
};

/// An implementation `kFunction(const QKNormRotation&, const QKNormRotaryGradInputs&)` with the C++ signature of the
/// schema of `qk_norm_rotary_embedding_backward`.
template <auto kFunction>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qk_norm_rotary_backward_kernel(
    const std::optional<at::Tensor>& grad_q,
    const std::optional<at::Tensor>& grad_k,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& q_weight,
    const at::Tensor& k_weight,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    double eps,
    bool unit_offset,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes,
    bool weights_grad) {
  QKNormRotaryGradients gradients = kFunction(
      {{cos, sin, positions, interleaved, conjugate, pair_axes}, q_weight, k_weight, eps, unit_offset},
      {grad_q, grad_k, q, k, weights_grad});
  return {std::move(gradients.q), std::move(gradients.k), std::move(gradients.q_weight), std::move(gradients.k_weight)};
}

// Calls through the dispatcher.
namespace dispatch {

std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_embedding(
    const QKNormRotation& rotation,
    const at::Tensor& q,
    const at::Tensor& k);

/// The gradients of `qk_norm_rotary_embedding`. For one head of one token, let x [D] be the input,
/// r = 1 / sqrt(mean(x^2) + eps), w [D] the weight (1 + weight with `unit_offset`), and g [D] the gradient of the
/// output rotated by the negative angles. Then
///
///     dx = r (g w - x r^2 mean(g w x)),    dw = sum over all tokens and heads of g x r,
///
/// with means over the D channels. Deterministic.
QKNormRotaryGradients qk_norm_rotary_embedding_backward(
    const QKNormRotation& rotation,
    const QKNormRotaryGradInputs& inputs);

}  // namespace dispatch
}  // namespace posenc
