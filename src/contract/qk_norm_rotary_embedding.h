#pragma once

#include <contract/qk_norm_rotary_problem.h>
#include <contract/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// What `qk_norm_rotary_embedding` and its backward accept.
namespace posenc::contract {

/// The arguments of `qk_norm_rotary_embedding`.
struct QKNormRotaryArguments {
  RotaryArguments rotary;
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& q_weight;
  const at::Tensor& k_weight;
  double eps;
  bool unit_offset;
};

/// @throws c10::Error  naming the argument, what was expected and what came.
void check_qk_norm_rotary(const QKNormRotaryArguments& arguments);

/// Checks all arguments and describes the call; the outputs are still missing.
QKNormRotaryProblem qk_norm_rotary_problem(const QKNormRotaryArguments& arguments);

/// The gradients of a backward call; undefined are those that are not asked for.
struct QKNormRotaryGradients {
  at::Tensor q, k, q_weight, k_weight;
};

/// Checks the arguments of `qk_norm_rotary_embedding_backward`.
void check_qk_norm_rotary_backward(
    const QKNormRotaryArguments& arguments,
    const std::optional<at::Tensor>& grad_q,
    const std::optional<at::Tensor>& grad_k);

/// Checks all arguments, allocates the gradients and describes the call. Operands whose gradient is absent are left
/// out; `rotary.num_operands` may be 0.
QKNormRotaryBackwardProblem qk_norm_rotary_backward_problem(
    const QKNormRotaryArguments& arguments,
    const std::optional<at::Tensor>& grad_q,
    const std::optional<at::Tensor>& grad_k,
    bool weights_grad,
    QKNormRotaryGradients& gradients);

/// The gradients without data, as `qk_norm_rotary_backward_problem` allocates them.
QKNormRotaryGradients allocate_qk_norm_rotary_gradients(
    const QKNormRotaryArguments& arguments,
    const std::optional<at::Tensor>& grad_q,
    const std::optional<at::Tensor>& grad_k,
    bool weights_grad);

/// Kernels of one dispatch key. They fill the outputs of `problem`, whose dtype and device are those of `like`.
using QKNormRotaryKernel = void (*)(const QKNormRotaryProblem& problem, const at::Tensor& like);
using QKNormRotaryBackwardKernel = void (*)(const QKNormRotaryBackwardProblem& problem, const at::Tensor& like);

/// `qk_norm_rotary_embedding` for a dispatch key: checks, outputs, kernel.
template <QKNormRotaryKernel kKernel>
std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_embedding(
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
  QKNormRotaryProblem problem = qk_norm_rotary_problem(
      {{"posenc::qk_norm_rotary_embedding", cos, sin, positions, interleaved, conjugate, pair_axes},
       q,
       k,
       q_weight,
       k_weight,
       eps,
       unit_offset});
  at::Tensor q_out = allocate_output(q, problem.rotary.operands[0]);
  at::Tensor k_out = allocate_output(k, problem.rotary.operands[1]);
  kKernel(problem, q);
  return {std::move(q_out), std::move(k_out)};
}

/// `qk_norm_rotary_embedding_backward` likewise.
template <QKNormRotaryBackwardKernel kKernel>
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
    bool weights_grad) {
  QKNormRotaryGradients gradients;
  const QKNormRotaryBackwardProblem problem = qk_norm_rotary_backward_problem(
      {{"posenc::qk_norm_rotary_embedding_backward", cos, sin, positions, interleaved, conjugate, pair_axes},
       q,
       k,
       q_weight,
       k_weight,
       eps,
       unit_offset},
      grad_q, grad_k, weights_grad, gradients);
  kKernel(problem, q);
  return {gradients.q, gradients.k, gradients.q_weight, gradients.k_weight};
}

}  // namespace posenc::contract
