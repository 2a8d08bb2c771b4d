#include "qk_norm_support.h"

#include <posenc/qk_norm_rotary_embedding.h>
#include <posenc/reference.h>

#include <ATen/ATen.h>

#include <cmath>

namespace posenc::test {
namespace {

at::Tensor wide_copy(const at::Tensor& x) {
  return x.detach().to(at::kCPU, at::kDouble).contiguous();
}

/// |x1 c| + |x2 s| or |x1 s| + |x2 c|, whichever is larger, for the channels that rotate, |x| for the others: what the
/// rounding of a rotation is relative to.
at::Tensor rotation_magnitude(const RotaryInputs& in, const at::Tensor& x) {
  RotaryInputs absolute = in_float64(in);
  absolute.cos = absolute.cos.abs();
  absolute.sin = absolute.sin.abs();
  return at::maximum(scalar_rotation(absolute, x.abs()), scalar_rotation(backwards(absolute), x.abs()));
}

/// What one rounding to `dtype` does to values of float64, unless they are computed in `dtype` anyhow.
at::Tensor narrowing(const at::Tensor& value, at::ScalarType dtype) {
  const double v = dtype == table_dtype(dtype) ? 0 : unit_roundoff(dtype);
  const double half_subnormal = dtype == at::kHalf ? 0x1p-25 : dtype == at::kDouble ? 0 : 0x1p-134;
  return value.abs() * v + half_subnormal;
}

/// The reciprocal of the root mean square of each head `[..., 1]`.
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

/// A sum of D squares, its mean, a root and a reciprocal: the relative error of the sum is halved by the root; a root
/// of 2 ulp, the offset of the weight and the products come to no more than 16 roundings.
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

// With u the unit roundoff of the arithmetic, z = x r w is off by at most `factor_error` of itself, and the rotation
// adds 2u + u^2 of its magnitude. The expected value has the same kind of error in float64.
Expected scalar_qk_norm(const QKNormInputs& in, const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor wide = wide_copy(x);
  const at::Tensor z = wide * scalar_rstd(wide, in.eps) * factor(weight, in.unit_offset);
  const at::Tensor y = scalar_rotation(in.rotary, z);
  const double u = unit_roundoff(table_dtype(x.scalar_type())) + unit_roundoff(at::kDouble);
  const at::Tensor computed = rotation_magnitude(in.rotary, z) * (factor_error(x.size(-1), u) + 3 * u);
  return {y, computed * (1 + unit_roundoff(x.scalar_type())) + narrowing(y, x.scalar_type())};
}

// With h the gradient rotated backwards, off by 2u + u^2 of its magnitude a, and m the mean of h w x r, off by no more
// than D + 16 roundings of that of a |w x| r and the error of r,
//
//     dx = r (h w - x r m),    dw = sum of h x r.
//
// A sum of n terms is off by n u of the sum of their magnitudes in whatever order.
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

}  // namespace posenc::test
