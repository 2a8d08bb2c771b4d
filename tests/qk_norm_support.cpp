#include "qk_norm_support.h"

#include "gradcheck.h"

#include <posenc/qk_norm_rotary_embedding.h>
#include <posenc/reference.h>

#include <ATen/ATen.h>

#include <cmath>

namespace posenc::test {
namespace {

at::Tensor wide_copy(const at::Tensor& x) {
  return x.detach().to(at::kCPU, at::kDouble).contiguous();
}

/// Magnitude that rounding errors of a rotation are relative to: the larger of |x1 c| + |x2 s| and |x1 s| + |x2 c| for
/// both channels of a pair, |x| for channels that are not rotated.
at::Tensor rotation_magnitude(const RotaryInputs& in, const at::Tensor& x) {
  RotaryInputs absolute = in_float64(in);
  absolute.cos = absolute.cos.abs();
  absolute.sin = absolute.sin.abs();
  return at::maximum(scalar_rotation(absolute, x.abs()), scalar_rotation(backwards(absolute), x.abs()));
}

/// Error of rounding float64 `value` to `dtype`; only that of subnormals if `dtype` is the dtype of the arithmetic.
at::Tensor narrowing(const at::Tensor& value, at::ScalarType dtype) {
  const double v = dtype == table_dtype(dtype) ? 0 : unit_roundoff(dtype);
  const double half_subnormal = dtype == at::kHalf ? 0x1p-25 : dtype == at::kDouble ? 0 : 0x1p-134;
  return value.abs() * v + half_subnormal;
}

/// Reciprocal root mean square of each head, `[..., 1]`.
at::Tensor scalar_rstd(const at::Tensor& x, double eps) {
  const int64_t head_dim = x.size(-1);
  at::Tensor result = at::empty(x.sizes().slice(0, static_cast<size_t>(x.dim() - 1)), at::kDouble);
  const double* from = x.const_data_ptr<double>();
  double* to = result.mutable_data_ptr<double>();
  for (int64_t head = 0; head < result.numel(); ++head) {
    double sum = 0;
    for (int64_t i = 0; i < head_dim; ++i) {
      sum += from[head * head_dim + i] * from[head * head_dim + i];
    }
    to[head] = 1 / std::sqrt(sum / static_cast<double>(head_dim) + eps);
  }
  return result.unsqueeze(-1);
}

at::Tensor factor(const at::Tensor& weight, bool unit_offset) {
  return unit_offset ? wide_copy(weight) + 1 : wide_copy(weight);
}

/// Relative error of `x * rstd * weight`. The sum of head_dim squares has an error of head_dim * u, which the square
/// root halves. Mean, root (2 ulp), reciprocal, offset of the weight and products are at most 16 roundings.
double factor_error(int64_t head_dim, double u) {
  return (static_cast<double>(head_dim) / 2 + 16) * u;
}

}  // namespace

QKNormInputs make_qk_norm_inputs(const RotaryCase& c, const Target& target, bool unit_offset, bool wide) {
  QKNormInputs in;
  in.rotary = make_inputs(c, target);
  in.unit_offset = unit_offset;
  const auto weight = [&] {
    const at::Tensor values = at::randn({c.head_dim}, at::kDouble) / 4 + (unit_offset ? 0 : 1);
    return values.to(target.device, wide ? table_dtype(target.dtype) : target.dtype);
  };
  in.q_weight = weight();
  in.k_weight = weight();
  return in;
}

QKNormInputs with_leaves(const QKNormInputs& in, bool tables) {
  QKNormInputs leaves = in;
  for (at::Tensor* tensor : {&leaves.rotary.q, &leaves.rotary.k, &leaves.q_weight, &leaves.k_weight}) {
    *tensor = tensor->detach().requires_grad_();
  }
  for (at::Tensor* tensor : {&leaves.rotary.cos, &leaves.rotary.sin}) {
    *tensor = tensor->detach().requires_grad_(tables);
  }
  return leaves;
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rotate(const QKNormInputs& in) {
  const RotaryInputs& r = in.rotary;
  return posenc::qk_norm_rotary_embedding(
      r.q, r.k, in.q_weight, in.k_weight, r.cos, r.sin, r.positions, in.eps, in.unit_offset, r.interleaved, r.conjugate,
      r.pair_axes);
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rotate_reference(const QKNormInputs& in) {
  const RotaryInputs& r = in.rotary;
  return posenc::reference::qk_norm_rotary_embedding(
      r.q, r.k, in.q_weight, in.k_weight, r.cos, r.sin, r.positions, in.eps, in.unit_offset, r.interleaved, r.conjugate,
      r.pair_axes);
}

// With u the unit roundoff of the arithmetic, z = x r w has a relative error of at most `factor_error`. The rotation
// adds 2u + u^2 times `rotation_magnitude`. The expected value has the same kind of error in float64.
Expected scalar_qk_norm(const QKNormInputs& in, const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor wide = wide_copy(x);
  const at::Tensor z = wide * scalar_rstd(wide, in.eps) * factor(weight, in.unit_offset);
  const at::Tensor y = scalar_rotation(in.rotary, z);
  const double u = unit_roundoff(table_dtype(x.scalar_type())) + unit_roundoff(at::kDouble);
  const at::Tensor computed = rotation_magnitude(in.rotary, z) * (factor_error(x.size(-1), u) + 3 * u);
  return {y, computed * (1 + unit_roundoff(x.scalar_type())) + narrowing(y, x.scalar_type())};
}

//     dx = r (h w - x r m),    dw = sum of h x r,    r = rstd
//
// h is `grad` under the opposite rotation, with an error of 2u + u^2 times its magnitude a. m is the mean of h w x r
// over the D channels, with an error of at most D + 16 roundings of the mean of a |w x| r, plus the error of r. A sum
// of n terms in any order has an error of n u times the sum of their magnitudes.
ExpectedGradients scalar_qk_norm_gradients(
    const QKNormInputs& in,
    const at::Tensor& x,
    const at::Tensor& weight,
    const at::Tensor& grad) {
  const at::Tensor wide = wide_copy(x);
  const at::Tensor w = factor(weight, in.unit_offset);
  const at::Tensor rstd = scalar_rstd(wide, in.eps);
  const at::Tensor x_hat = wide * rstd;
  const at::Tensor h = scalar_rotation(backwards(in.rotary), wide_copy(grad));
  const at::Tensor a = rotation_magnitude(in.rotary, wide_copy(grad));
  const at::Tensor dx = rstd * (h * w - x_hat * (h * w * x_hat).mean(-1, true));
  const at::Tensor dx_magnitude = rstd * (a * w.abs() + x_hat.abs() * (a * w.abs() * x_hat.abs()).mean(-1, true));
  const at::Tensor dw = (h * x_hat).flatten(0, -2).sum(0);
  const at::Tensor dw_magnitude = (a * x_hat.abs()).flatten(0, -2).sum(0);

  const double u = unit_roundoff(table_dtype(x.scalar_type())) + unit_roundoff(at::kDouble);
  const auto head_dim = static_cast<double>(x.size(-1));
  const auto terms = static_cast<double>(x.numel()) / std::max(1.0, head_dim);
  const double of_head = 3 * factor_error(x.size(-1), u) + (head_dim + 16) * u;
  const double of_sum = factor_error(x.size(-1), u) + (terms + 3) * u;
  return {
      {dx, dx_magnitude * of_head * (1 + unit_roundoff(x.scalar_type())) + narrowing(dx, x.scalar_type())},
      {dw, dw_magnitude * of_sum * (1 + unit_roundoff(weight.scalar_type())) + narrowing(dw, weight.scalar_type())}};
}

void expect_qk_norm_results(const QKNormInputs& in, const at::Tensor& grad_q, const at::Tensor& grad_k) {
  const QKNormInputs leaves = with_leaves(in, /*tables=*/false);
  const auto [q, k] = qk_norm_rotate(leaves);
  const RotaryInputs& r = in.rotary;
  {
    SCOPED_TRACE("q");
    EXPECT_EQ(q.scalar_type(), r.q.scalar_type());
    expect_within(q, scalar_qk_norm(in, r.q, in.q_weight));
  }
  {
    SCOPED_TRACE("k");
    EXPECT_EQ(k.scalar_type(), r.k.scalar_type());
    expect_within(k, scalar_qk_norm(in, r.k, in.k_weight));
  }
  const TensorList found =
      gradients({q, k}, {leaves.rotary.q, leaves.rotary.k, leaves.q_weight, leaves.k_weight}, {grad_q, grad_k});
  const ExpectedGradients of_q = scalar_qk_norm_gradients(in, r.q, in.q_weight, grad_q);
  const ExpectedGradients of_k = scalar_qk_norm_gradients(in, r.k, in.k_weight, grad_k);
  const auto check = [](const char* name, const at::Tensor& actual, const Expected& expected, const at::Tensor& of) {
    SCOPED_TRACE(name);
    EXPECT_EQ(actual.scalar_type(), of.scalar_type());
    expect_within(actual, expected);
  };
  check("gradient of q", found[0], of_q.input, r.q);
  check("gradient of k", found[1], of_k.input, r.k);
  check("gradient of q_weight", found[2], of_q.weight, in.q_weight);
  check("gradient of k_weight", found[3], of_k.weight, in.k_weight);
}

}  // namespace posenc::test
