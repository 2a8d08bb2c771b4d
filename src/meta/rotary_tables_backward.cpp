#include <contract/rotary_frequencies.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

Tensor rotary_tables_backward_meta(
    const Tensor& grad_cos,
    const Tensor& grad_sin,
    const Tensor& cos,
    const Tensor& sin,
    at::ScalarType dtype) {
  const bool symbolic = meta::has_symbolic_sizes(grad_cos) || meta::has_symbolic_sizes(grad_sin) ||
      meta::has_symbolic_sizes(cos) || meta::has_symbolic_sizes(sin);
  if (!symbolic) {
    contract::check_frequencies_backward({grad_cos, grad_sin, cos, sin, dtype});
  }
  return at::empty_symint({cos.sym_size(1)}, cos.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_tables_backward", rotary_tables_backward_meta);
}

}  // namespace posenc
