#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace posenc {

/// The gradients of `qk_norm_rotary_embedding`. With g one head of an output's gradient rotated backwards, r the
/// reciprocal of the root mean square of its input x, and w its weight,
///
///     dx = r (g w - x r^2 mean(g w x)),    dw = sum over tokens and heads of g x r.
///
/// Deterministic.
///
/// @param grad_q,grad_k  gradients of the outputs; the results that belong to one that is absent are undefined.
/// @param weights_grad  whether the gradients of the weights are wanted; they are undefined otherwise.
/// @return `(dq, dk, dq_weight, dk_weight)`, each of the dtype of what it is the gradient of.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> qk_norm_rotary_embedding_backward(
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
    bool weights_grad);

}  // namespace posenc
