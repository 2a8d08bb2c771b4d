#include <contract/alibi.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

// An argument by value is how the dispatcher knows a symbol.
// NOLINTBEGIN(performance-unnecessary-value-param)
namespace posenc {
namespace {

using at::Tensor;

Tensor alibi_bias_meta(
    const Tensor& slopes,
    c10::SymInt q_len,
    c10::SymInt k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<c10::SymInt> query_offset) {
  if (!q_len.is_symbolic() && !k_len.is_symbolic() && !meta::has_symbolic_sizes(slopes) &&
      !meta::is_symbolic(query_offset)) {
    contract::alibi_bias_problem(
        {"posenc::alibi_bias", causal, meta::concrete(query_offset)}, slopes, q_len.expect_int(), k_len.expect_int(),
        dtype);
  }
  return at::empty_symint({slopes.sym_size(0), q_len, k_len}, slopes.options().dtype(dtype));
}

}  // namespace
// NOLINTEND(performance-unnecessary-value-param)

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_bias", alibi_bias_meta);
}

}  // namespace posenc
