#include "learnable_frequencies_support.h"

#include <ATen/ATen.h>

#include <cmath>

namespace posenc::test {

std::pair<at::Tensor, at::Tensor> scalar_frequency_gradient(
    const at::Tensor& inv_freq,
    const at::Tensor& grad_cos,
    const at::Tensor& grad_sin,
    double attention_factor) {
  const auto wide = [](const at::Tensor& tensor) { return tensor.detach().to(at::kCPU, at::kDouble).contiguous(); };
  const at::Tensor frequencies = wide(inv_freq);
  const at::Tensor dcos = wide(grad_cos);
  const at::Tensor dsin = wide(grad_sin);
  const int64_t pairs = frequencies.size(0);
  at::Tensor sum = at::zeros({pairs}, at::kDouble);
  at::Tensor magnitude = at::zeros({pairs}, at::kDouble);
  for (int64_t p = 0; p < dcos.size(0); ++p) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(p) * frequencies.data_ptr<double>()[i];
      const double of_cos = dcos.data_ptr<double>()[p * pairs + i];
      const double of_sin = dsin.data_ptr<double>()[p * pairs + i];
      const double scale = attention_factor * static_cast<double>(p);
      sum.data_ptr<double>()[i] += scale * (std::cos(angle) * of_sin - std::sin(angle) * of_cos);
      magnitude.data_ptr<double>()[i] += scale * (std::abs(of_sin) + std::abs(of_cos));
    }
  }
  return {sum, magnitude};
}

}  // namespace posenc::test
