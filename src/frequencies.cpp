#include <posenc/frequencies.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/pow.h>

namespace posenc {

using at::Tensor;

Tensor rotary_inv_freq(int64_t rotary_dim, double base) {
  TORCH_CHECK(
      rotary_dim > 0 && rotary_dim % 2 == 0, "posenc::rotary_inv_freq: expected a positive, even rotary_dim, got ",
      rotary_dim);
  TORCH_CHECK(base > 0, "posenc::rotary_inv_freq: expected a positive base, got ", base);
  const Tensor i = at::arange(rotary_dim / 2, at::TensorOptions().dtype(at::kDouble));
  return at::pow(base, i.mul(-2.0).div(rotary_dim));
}

at::ScalarType rotary_table_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace posenc
