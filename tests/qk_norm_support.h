#pragma once

#include "support.h"

/// Random calls of `qk_norm_rotary_embedding`, and expected results and gradients from scalar loops.
namespace posenc::test {

/// Arguments of `qk_norm_rotary_embedding`; `rotary` holds those that `rotary_embedding_qk` also takes.
struct QKNormInputs {
  RotaryInputs rotary;
  at::Tensor q_weight;
  at::Tensor k_weight;
  double eps = 1e-6;
  bool unit_offset = false;
};

/// Arguments as `c` describes them. Weights are normally distributed around 1, or around 0 with `unit_offset`. Their
/// dtype is that of q and k, or with `wide` the dtype of the arithmetic (float32, or float64 for float64).
QKNormInputs make_qk_norm_inputs(
    const RotaryCase& c,
    const Target& target,
    bool unit_offset = false,
    bool wide = false);

/// The same arguments as leaves: q, k and both weights require grad, cos and sin if `tables`.
QKNormInputs with_leaves(const QKNormInputs& in, bool tables = true);

std::tuple<at::Tensor, at::Tensor> qk_norm_rotate(const QKNormInputs& in);
std::tuple<at::Tensor, at::Tensor> qk_norm_rotate_reference(const QKNormInputs& in);

/// A value from a scalar loop in float64 on the CPU, and the bound of the rounding error of the operator in the dtype
/// of the call; derived at the definitions.
struct Expected {
  at::Tensor value;
  at::Tensor bound;
};

/// `x` normalised with `weight` and rotated.
Expected scalar_qk_norm(const QKNormInputs& in, const at::Tensor& x, const at::Tensor& weight);

/// Gradients of `sum(grad * qk_norm_rotary_embedding(x))` for `x` and `weight`.
struct ExpectedGradients {
  Expected input;
  Expected weight;
};
ExpectedGradients scalar_qk_norm_gradients(
    const QKNormInputs& in,
    const at::Tensor& x,
    const at::Tensor& weight,
    const at::Tensor& grad);

inline void expect_within(const at::Tensor& actual, const Expected& expected) {
  expect_within(actual, expected.value, expected.bound);
}

/// Expects results, and gradients for `grad_q` and `grad_k`, to equal those of the scalar loops.
void expect_qk_norm_results(const QKNormInputs& in, const at::Tensor& grad_q, const at::Tensor& grad_k);

}  // namespace posenc::test
