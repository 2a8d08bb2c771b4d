#pragma once

#include "support.h"

/// Random calls of `qk_norm_rotary_embedding`, and their results and gradients worked out by scalar loops.
namespace posenc::test {

/// Arguments of a call; `rotary` has those that it shares with `rotary_embedding_qk`.
struct QKNormInputs {
  RotaryInputs rotary;
  at::Tensor q_weight;
  at::Tensor k_weight;
  double eps = 1e-6;
  bool unit_offset = false;
};

/// Arguments as `c` describes them, with normal weights around 1 (around 0 with `unit_offset`). `wide` weights have the
/// dtype of the arithmetic, others that of the tensors.
QKNormInputs make_qk_norm_inputs(
    const RotaryCase& c,
    const Target& target,
    bool unit_offset = false,
    bool wide = false);

/// The same with leaves that require grad for all that is differentiable, or for the tensors and weights alone.
QKNormInputs with_leaves(const QKNormInputs& in, bool tables = true);

std::tuple<at::Tensor, at::Tensor> qk_norm_rotate(const QKNormInputs& in);
std::tuple<at::Tensor, at::Tensor> qk_norm_rotate_reference(const QKNormInputs& in);

/// A value by a loop over scalars in float64 on the CPU, and the largest difference from it that correct arithmetic in
/// the dtype of a call can show; see the definitions.
struct Expected {
  at::Tensor value;
  at::Tensor bound;
};

/// `x` normalised with `weight` and rotated.
Expected scalar_qk_norm(const QKNormInputs& in, const at::Tensor& x, const at::Tensor& weight);

/// The gradients of `sum(grad * qk_norm_rotary_embedding(x))` to `x` and to `weight`.
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

}  // namespace posenc::test
