#include <contract/rotary_frequencies.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

/// In tensor operations: LibTorch's cosine of float64 is vectorised for each instruction set, which a loop over the
/// standard library's is not.
std::tuple<Tensor, Tensor> rotary_tables_cpu(
    const Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor) {
  contract::check_frequencies(inv_freq, length, dtype, attention_factor);
  const Tensor wide = inv_freq.to(at::kDouble);
  const Tensor angles = at::outer(at::arange(length, wide.options()), wide);
  return {angles.cos().mul_(attention_factor).to(dtype), angles.sin().mul_(attention_factor).to(dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_tables", rotary_tables_cpu);
}

}  // namespace posenc
