#include <posenc/alibi.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <cmath>

namespace posenc {

using at::Tensor;

/// The rule of the authors (get_slopes of https://github.com/ofirpress/attention_with_linear_biases).
Tensor alibi_slopes(int64_t num_heads, double max_bias) {
  TORCH_CHECK(num_heads > 0, "posenc::alibi_slopes: expected a positive num_heads, got ", num_heads);
  TORCH_CHECK(
      max_bias > 0 && std::isfinite(max_bias), "posenc::alibi_slopes: expected a positive, finite max_bias, got ",
      max_bias);
  int64_t power = 1;  // the largest power of two that is at most num_heads
  while (power <= num_heads / 2) {
    power *= 2;
  }
  // Computed in tensor operations, so that it can be traced without data.
  const Tensor h = at::arange(num_heads, at::TensorOptions().dtype(at::kDouble));
  const auto n = static_cast<double>(power);
  // Head h >= power has the slope of head 2 (h - power) among 2 power heads.
  const Tensor exponents = at::where(h < n, (h + 1) / n, (2 * (h - n) + 1) / (2 * n));
  return at::exp2(exponents.mul(-max_bias)).to(at::kFloat);
}

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  // There are no tensors among the arguments to dispatch on.
  m.def("alibi_slopes(int num_heads, float max_bias=8.0) -> Tensor", alibi_slopes);
}

}  // namespace posenc
