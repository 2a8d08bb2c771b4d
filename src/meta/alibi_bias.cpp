#include <contract/alibi.h>

#include <ATen/ops/empty.h>
#include <meta/detail/symbolic.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

Tensor alibi_bias_meta(
    const Tensor& slopes,
    const c10::SymInt& q_len,
    const c10::SymInt& k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<int64_t> query_offset) {
  if (!q_len.is_symbolic() && !k_len.is_symbolic() && !meta::has_symbolic_sizes(slopes)) {
    contract::alibi_bias_problem(
        {"posenc::alibi_bias", causal, query_offset}, slopes, q_len.expect_int(), k_len.expect_int(), dtype);
  }
  return at::empty_symint({slopes.sym_size(0), q_len, k_len}, slopes.options().dtype(dtype));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_bias", alibi_bias_meta);
}

}  // namespace posenc
