#include <contract/alibi.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

// An argument by value is how the dispatcher knows a symbol.
// NOLINTBEGIN(performance-unnecessary-value-param)
namespace posenc {
namespace {

using at::Tensor;

Tensor alibi_slopes_backward_meta(const Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset) {
  if (!meta::has_symbolic_sizes(grad) && !meta::is_symbolic(query_offset)) {
    contract::alibi_shape({"posenc::alibi_slopes_backward", causal, meta::concrete(query_offset)}, "grad", grad);
  }
  return at::empty_symint({grad.sym_size(-3)}, grad.options().dtype(contract::alibi_slopes_dtype(grad.scalar_type())));
}

}  // namespace
// NOLINTEND(performance-unnecessary-value-param)

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_slopes_backward", alibi_slopes_backward_meta);
}

}  // namespace posenc
