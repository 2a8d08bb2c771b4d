#include <arguments/qk_norm_rotary_embedding.h>

#include <arguments/tensor.h>
#include <posenc/frequencies.h>

#include <ATen/ops/empty_like.h>

#include <cmath>

namespace posenc::arguments {
namespace {

using at::Tensor;

constexpr const char* kBackward = "posenc::qk_norm_rotary_embedding_backward";

void check_weight(const char* op, const char* name, const Tensor& weight, const Tensor& x) {
  check_defined(op, name, weight);
  TORCH_CHECK(
      weight.dim() == 1 && weight.size(0) == x.size(-1), op, ": expected ", name, " of shape [D] = [", x.size(-1),
      "], got ", weight.sizes());
  const auto wide = rotary_table_dtype(x.scalar_type());
  TORCH_CHECK(
      weight.scalar_type() == x.scalar_type() || weight.scalar_type() == wide, op, ": expected ", name, " of dtype ",
      x.scalar_type(), " or ", wide, " for q of dtype ", x.scalar_type(), ", got ", weight.scalar_type());
  check_device(op, {name, weight}, {"q", x});
}

bool is_given(const std::optional<Tensor>& grad) {
  return grad.has_value() && grad->defined();
}

QKNormRotaryProblem::Weight weight_view(const Tensor& weight) {
  return {weight.const_data_ptr(), used_stride(weight, 0)};
}

/// Describes a call whose arguments have been checked, without its outputs.
QKNormRotaryProblem describe(const char* op, const QKNormRotation& a, const Tensor& q, const Tensor& k) {
  QKNormRotaryProblem problem{};
  problem.rotary = describe_rotary(op, a.rotation(), {{"q", q}, {"k", k}});
  problem.weights[0] = weight_view(a.q_weight);
  problem.weights[1] = weight_view(a.k_weight);
  problem.weights_are_wide = a.q_weight.scalar_type() == rotary_table_dtype(q.scalar_type());
  problem.unit_offset = a.unit_offset;
  problem.eps = a.eps;
  return problem;
}

}  // namespace

void check_qk_norm_rotary(const char* op, const QKNormRotation& a, const Tensor& q, const Tensor& k) {
  check_rotary(op, a.rotation(), {{"q", q}, {"k", k}});
  check_weight(op, "q_weight", a.q_weight, q);
  check_weight(op, "k_weight", a.k_weight, q);
  TORCH_CHECK(
      a.k_weight.scalar_type() == a.q_weight.scalar_type(), op, ": expected k_weight of the dtype of q_weight, ",
      a.q_weight.scalar_type(), ", got ", a.k_weight.scalar_type());
  TORCH_CHECK(a.eps > 0 && std::isfinite(a.eps), op, ": expected a positive, finite eps, got ", a.eps);
}

QKNormRotaryProblem qk_norm_rotary_problem(const QKNormRotation& a, const Tensor& q, const Tensor& k) {
  constexpr const char* kOp = "posenc::qk_norm_rotary_embedding";
  check_qk_norm_rotary(kOp, a, q, k);
  return describe(kOp, a, q, k);
}

void check_qk_norm_rotary_backward(const QKNormRotation& a, const QKNormRotaryGradInputs& inputs) {
  check_qk_norm_rotary(kBackward, a, inputs.q, inputs.k);
  if (is_given(inputs.grad_q)) {
    check_like(kBackward, {"grad_q", *inputs.grad_q}, {"q", inputs.q});
  }
  if (is_given(inputs.grad_k)) {
    check_like(kBackward, {"grad_k", *inputs.grad_k}, {"k", inputs.k});
  }
}

QKNormRotaryGradients allocate_qk_norm_rotary_gradients(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& a) {
  const auto gradient_of_weight = [&](const Tensor& weight) {
    return mask.weights_grad ? at::empty_like(weight, at::MemoryFormat::Contiguous) : Tensor();
  };
  QKNormRotaryGradients gradients;
  if (is_given(inputs.grad_q)) {
    gradients.q = at::empty_like(inputs.q);
    gradients.q_weight = gradient_of_weight(a.q_weight);
  }
  if (is_given(inputs.grad_k)) {
    gradients.k = at::empty_like(inputs.k);
    gradients.k_weight = gradient_of_weight(a.k_weight);
  }
  return gradients;
}

QKNormRotaryBackwardProblem qk_norm_rotary_backward_problem(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& a,
    QKNormRotaryGradients& gradients) {
  check_qk_norm_rotary_backward(a, inputs);
  gradients = allocate_qk_norm_rotary_gradients(mask, inputs, a);

  QKNormRotaryBackwardProblem problem{};
  problem.call = describe(kBackward, a, inputs.q, inputs.k);
  const RotaryProblem::Operand operands[2] = {problem.call.rotary.operands[0], problem.call.rotary.operands[1]};
  const QKNormRotaryProblem::Weight weights[2] = {problem.call.weights[0], problem.call.weights[1]};
  problem.call.rotary.operands[0] = problem.call.rotary.operands[1] = {};
  int32_t count = 0;
  const auto add = [&](int i, const std::optional<Tensor>& grad, const Tensor& result, const Tensor& weight_grad) {
    if (!is_given(grad)) {
      return;
    }
    problem.inputs[count] = {operands[i].in, operands[i].in_strides};
    problem.call.rotary.operands[count] = {
        grad->const_data_ptr(), result.mutable_data_ptr(), strides_of(*grad), strides_of(result),
        operands[i].num_heads};
    problem.call.weights[count] = weights[i];
    problem.weight_grads[count] = weight_grad.defined() ? weight_grad.mutable_data_ptr() : nullptr;
    ++count;
  };
  add(0, inputs.grad_q, gradients.q, gradients.q_weight);
  add(1, inputs.grad_k, gradients.k, gradients.k_weight);
  problem.call.rotary.num_operands = count;
  problem.call.rotary.conjugate = !a.conjugate;
  return problem;
}

}  // namespace posenc::arguments
