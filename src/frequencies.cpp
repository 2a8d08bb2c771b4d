#include <posenc/frequencies.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>
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

std::tuple<Tensor, Tensor> rotary_tables(const Tensor& inv_freq, int64_t length, at::ScalarType dtype) {
  TORCH_CHECK(
      inv_freq.defined() && inv_freq.dim() == 1 && inv_freq.scalar_type() == at::kDouble,
      "posenc::rotary_tables: expected inv_freq of dtype float64 and shape [R/2], got ",
      inv_freq.defined() ? c10::str(inv_freq.scalar_type(), " ", inv_freq.sizes()) : "an undefined tensor");
  TORCH_CHECK(length >= 0, "posenc::rotary_tables: expected a length that is not negative, got ", length);
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kDouble, "posenc::rotary_tables: expected dtype float32 or float64, got ",
      dtype);
  const Tensor angles = at::outer(at::arange(length, inv_freq.options()), inv_freq);
  return {angles.cos().to(dtype), angles.sin().to(dtype)};
}

}  // namespace posenc
