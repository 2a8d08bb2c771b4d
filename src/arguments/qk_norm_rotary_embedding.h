#pragma once

#include <arguments/qk_norm_rotary_problem.h>
#include <arguments/rotary_embedding.h>
#include <ops/qk_norm_rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <tuple>

// Checks of `qk_norm_rotary_embedding` and its backward, and their kernels' problems.
namespace posenc::arguments {

/// Check shapes, dtypes and devices of all arguments; `op` is the name of the operator in messages.
/// @throws c10::Error  at the first argument that is wrong: its name, what was expected and what was given.
void check_qk_norm_rotary(const char* op, const QKNormRotation& rotation, const at::Tensor& q, const at::Tensor& k);
void check_qk_norm_rotary_backward(const QKNormRotation& rotation, const QKNormRotaryGradInputs& inputs);

/// Checks all arguments and describes the call, without its outputs.
QKNormRotaryProblem qk_norm_rotary_problem(const QKNormRotation& rotation, const at::Tensor& q, const at::Tensor& k);

/// Allocates the gradients of the inputs whose incoming gradient is given, and if `mask.weights_grad` of their weights.
QKNormRotaryGradients allocate_qk_norm_rotary_gradients(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& rotation);

/// Checks all arguments, allocates `gradients` and describes the call. The problem has no operand for q or k if its
/// incoming gradient is absent; `rotary.num_operands` is 0 if both are.
QKNormRotaryBackwardProblem qk_norm_rotary_backward_problem(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& rotation,
    QKNormRotaryGradients& gradients);

/// Kernels of one dispatch key. They fill the outputs of `problem`, whose dtype and device are those of `like`.
using QKNormRotaryKernel = void (*)(const QKNormRotaryProblem& problem, const at::Tensor& like);
using QKNormRotaryBackwardKernel = void (*)(const QKNormRotaryBackwardProblem& problem, const at::Tensor& like);

// The operators for one dispatch key. Each checks its arguments, allocates its outputs and runs the kernel.

template <QKNormRotaryKernel kKernel>
std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_embedding(
    const QKNormRotation& rotation,
    const at::Tensor& q,
    const at::Tensor& k) {
  QKNormRotaryProblem problem = qk_norm_rotary_problem(rotation, q, k);
  at::Tensor q_out = allocate_output(q, problem.rotary.operands[0]);
  at::Tensor k_out = allocate_output(k, problem.rotary.operands[1]);
  kKernel(problem, q);
  return {std::move(q_out), std::move(k_out)};
}

template <QKNormRotaryBackwardKernel kKernel>
QKNormRotaryGradients qk_norm_rotary_embedding_backward(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& rotation) {
  QKNormRotaryGradients gradients;
  kKernel(qk_norm_rotary_backward_problem(mask, inputs, rotation, gradients), inputs.q);
  return gradients;
}

}  // namespace posenc::arguments
