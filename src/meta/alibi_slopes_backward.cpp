#include <contract/alibi.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

Tensor alibi_slopes_backward_meta(const Tensor& grad, bool causal, std::optional<int64_t> query_offset) {
  if (!meta::has_symbolic_sizes(grad)) {
    contract::alibi_shape({"posenc::alibi_slopes_backward", causal, query_offset}, "grad", grad);
  }
  return at::empty_symint({grad.sym_size(-3)}, grad.options().dtype(contract::alibi_slopes_dtype(grad.scalar_type())));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_slopes_backward", alibi_slopes_backward_meta);
}

}  // namespace posenc
