#include "rotary_embedding_module_support.h"

#include <posenc/modules/rotary_embedding.h>

#include <ATen/ATen.h>

#include <cmath>

namespace posenc::test {
namespace {

/// cos and sin of a module with these options, by the scalar functions of the standard library.
RotaryInputs with_scalar_tables(const RotaryEmbeddingOptions& options, int64_t length, at::ScalarType dtype) {
  const int64_t rotary_dim = options.rotary_dim().value_or(options.head_dim());
  RotaryInputs in;
  in.cos = at::empty({length, rotary_dim / 2}, at::kDouble);
  in.sin = at::empty_like(in.cos);
  auto cos = in.cos.accessor<double, 2>();
  auto sin = in.sin.accessor<double, 2>();
  for (int64_t p = 0; p < length; ++p) {
    for (int64_t i = 0; i < rotary_dim / 2; ++i) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim);
      const double angle = static_cast<double>(p) * std::pow(options.base(), exponent);
      cos[p][i] = std::cos(angle);
      sin[p][i] = std::sin(angle);
    }
  }
  in.cos = in.cos.to(table_dtype(dtype));
  in.sin = in.sin.to(table_dtype(dtype));
  in.interleaved = options.interleaved();
  return in;
}

}  // namespace

void expect_rotated(
    const at::Tensor& actual,
    const at::Tensor& x,
    const RotaryEmbeddingOptions& options,
    const std::optional<at::Tensor>& positions,
    int64_t length) {
  RotaryInputs in = with_scalar_tables(options, length, x.scalar_type());
  if (positions) {
    in.positions = positions->cpu();
  }
  const at::Tensor on_cpu = x.detach().cpu();
  const double of_entry =
      2 * unit_roundoff(table_dtype(x.scalar_type())) + 8 * unit_roundoff(at::kDouble) * static_cast<double>(length);
  const at::Tensor largest = on_cpu.to(at::kDouble).abs().amax(-1, /*keepdim=*/true);
  const at::Tensor bound = rounding_bound(in, on_cpu) + largest * 2 * of_entry;
  expect_within(actual, scalar_rotation(in, on_cpu), bound);
}

}  // namespace posenc::test
