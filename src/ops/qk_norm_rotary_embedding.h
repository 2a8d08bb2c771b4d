#pragma once

#include <ops/dispatch.h>
#include <ops/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// `qk_norm_rotary_embedding` and its backward below the public function.
namespace posenc {

/// The arguments of `qk_norm_rotary_embedding` beside q and k, as `posenc/qk_norm_rotary_embedding.h` documents them.
/// It refers to the tensors of the call.
struct QKNormRotation {
  const at::Tensor& q_weight;
  const at::Tensor& k_weight;
  const at::Tensor& cos;
  const at::Tensor& sin;
  const std::optional<at::Tensor>& positions;
  double eps;
  bool unit_offset;
  bool interleaved;
  bool conjugate;
  at::IntArrayRef pair_axes;

  Rotation rotation() const { return {cos, sin, positions, interleaved, conjugate, pair_axes}; }

  auto flat() const {
    return std::tie(q_weight, k_weight, cos, sin, positions, eps, unit_offset, interleaved, conjugate, pair_axes);
  }
};

/// The gradients of q, k, q_weight and k_weight, each of the shape and dtype of that tensor. Those of q and q_weight
/// are undefined where `grad_q` is absent, those of k and k_weight where `grad_k` is. Those of the weights are
/// undefined unless `weights_grad`.
struct QKNormRotaryGradients {
  at::Tensor q, k, q_weight, k_weight;

  auto flat() { return std::tie(q, k, q_weight, k_weight); }
};

/// The inputs of `qk_norm_rotary_embedding_backward`.
struct QKNormRotaryGradInputs {
  const std::optional<at::Tensor>& grad_q;  // gradients of the outputs; nullopt or undefined means zero
  const std::optional<at::Tensor>& grad_k;
  const at::Tensor& q;
  const at::Tensor& k;

  auto flat() const { return std::tie(grad_q, grad_k, q, k); }
};

/// The argument of `qk_norm_rotary_embedding_backward` beside its inputs and the rotation.
struct QKNormRotaryGradMask {
  bool weights_grad;  // whether dq_weight and dk_weight are computed

  auto flat() const { return std::tie(weights_grad); }
};

// Calls through the dispatcher.
namespace dispatch {

inline std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_embedding(
    const QKNormRotation& rotation,
    const at::Tensor& q,
    const at::Tensor& k) {
  return call_operator<&qk_norm_rotary_embedding>("posenc::qk_norm_rotary_embedding", rotation, q, k);
}

/// The gradients of `qk_norm_rotary_embedding`. For one head of one token, let x [D] be the input,
/// r = 1 / sqrt(mean(x^2) + eps), w [D] the weight (1 + weight with `unit_offset`), and g [D] the gradient of the
/// output rotated by the negative angles. Then
///
///     dx = r (g w - x r^2 mean(g w x)),    dw = sum over all tokens and heads of g x r,
///
/// with means over the D channels. Deterministic.
inline QKNormRotaryGradients qk_norm_rotary_embedding_backward(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& rotation) {
  return call_operator<&qk_norm_rotary_embedding_backward>(
      "posenc::qk_norm_rotary_embedding_backward", mask, inputs, rotation);
}

}  // namespace dispatch
}  // namespace posenc
