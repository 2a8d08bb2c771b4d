#include <arguments/rotary_frequencies.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> rotary_tables_meta(
    const Tensor& inv_freq,
    c10::SymInt length,  // NOLINT(performance-unnecessary-value-param): how the dispatcher knows a symbol
    at::ScalarType dtype,
    double attention_factor) {
  if (!length.is_symbolic() && !meta::has_symbolic_sizes(inv_freq)) {
    arguments::check_frequencies(inv_freq, length.expect_int(), dtype, attention_factor);
  }
  const auto table = [&] { return at::empty_symint({length, inv_freq.sym_size(0)}, inv_freq.options().dtype(dtype)); };
  return {table(), table()};
}

Tensor rotary_tables_backward_meta(
    const Tensor& grad_cos,
    const Tensor& grad_sin,
    const Tensor& cos,
    const Tensor& sin,
    at::ScalarType dtype) {
  if (!meta::any_symbolic({grad_cos, grad_sin, cos, sin})) {
    arguments::check_frequencies_backward({grad_cos, grad_sin, cos, sin, dtype});
  }
  return at::empty_symint({cos.sym_size(1)}, cos.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_tables", rotary_tables_meta);
  m.impl("rotary_tables_backward", rotary_tables_backward_meta);
}

}  // namespace posenc
