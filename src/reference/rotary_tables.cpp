#include <posenc/reference.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>

namespace posenc::reference {

std::tuple<at::Tensor, at::Tensor> rotary_tables(
    const at::Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor) {
  const at::Tensor wide = inv_freq.to(at::kDouble);
  const at::Tensor angles = at::outer(at::arange(length, wide.options()), wide);
  return {(angles.cos() * attention_factor).to(dtype), (angles.sin() * attention_factor).to(dtype)};
}

}  // namespace posenc::reference
