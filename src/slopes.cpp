#include <posenc/alibi.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

namespace posenc {

using at::Tensor;

/// The authors' own rule (get_slopes of https://github.com/ofirpress/attention_with_linear_biases).
Tensor alibi_slopes(int64_t num_heads, double max_bias) {
  TORCH_CHECK(num_heads > 0, "posenc::alibi_slopes: expected a positive num_heads, got ", num_heads);
  TORCH_CHECK(
      max_bias > 0 && std::isfinite(max_bias), "posenc::alibi_slopes: expected a positive, finite max_bias, got ",
      max_bias);
  int64_t power = 1;  // the largest power of two that is at most num_heads
  while (power <= num_heads / 2) {
    power *= 2;
  }
  Tensor slopes = at::empty({num_heads}, at::TensorOptions().dtype(at::kFloat));
  float* data = slopes.mutable_data_ptr<float>();
  for (int64_t h = 0; h < num_heads; ++h) {
    // Head h - power of the second part is number 2 (h - power) of the slopes for twice as many heads.
    const double exponent = h < power ? static_cast<double>(h + 1) / static_cast<double>(power)
                                      : static_cast<double>(2 * (h - power) + 1) / static_cast<double>(2 * power);
    data[h] = static_cast<float>(std::exp2(-max_bias * exponent));
  }
  return slopes;
}

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  // Without tensors among the arguments there is no device to dispatch on.
  m.def("alibi_slopes(int num_heads, float max_bias=8.0) -> Tensor", alibi_slopes);
}

}  // namespace posenc
