#include <arguments/alibi.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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
    arguments::alibi_bias_problem(
        {"posenc::alibi_bias", causal, meta::concrete(query_offset)}, slopes, q_len.expect_int(), k_len.expect_int(),
        dtype);
  }
  return at::empty_symint({slopes.sym_size(0), q_len, k_len}, slopes.options().dtype(dtype));
}

bool is_symbolic(const Tensor& scores, const Tensor& slopes, const std::optional<c10::SymInt>& query_offset) {
  return meta::any_symbolic({scores, slopes}) || meta::is_symbolic(query_offset);
}

Tensor alibi_add_meta(
    const Tensor& scores,
    const Tensor& slopes,
    bool causal,
    std::optional<c10::SymInt> query_offset) {
  if (!is_symbolic(scores, slopes, query_offset)) {
    arguments::alibi_add_problem({"posenc::alibi_add", causal, meta::concrete(query_offset)}, scores, slopes);
  }
  return at::empty_like(scores);
}

void alibi_add_meta_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<c10::SymInt> query_offset) {
  if (!is_symbolic(scores, slopes, query_offset)) {
    arguments::alibi_add_in_place_problem({"posenc::alibi_add_", causal, meta::concrete(query_offset)}, scores, slopes);
  }
}

Tensor alibi_mask_meta(const Tensor& grad, std::optional<c10::SymInt> query_offset) {
  if (!meta::has_symbolic_sizes(grad) && !meta::is_symbolic(query_offset)) {
    arguments::alibi_mask_problem({"posenc::alibi_mask", /*causal=*/true, meta::concrete(query_offset)}, grad);
  }
  return at::empty_like(grad);
}

Tensor alibi_slopes_backward_meta(const Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset) {
  if (!meta::has_symbolic_sizes(grad) && !meta::is_symbolic(query_offset)) {
    arguments::alibi_shape({"posenc::alibi_slopes_backward", causal, meta::concrete(query_offset)}, "grad", grad);
  }
  return at::empty_symint({grad.sym_size(-3)}, grad.options().dtype(arguments::alibi_slopes_dtype(grad.scalar_type())));
}

}  // namespace
// NOLINTEND(performance-unnecessary-value-param)

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_bias", alibi_bias_meta);
  m.impl("alibi_add", alibi_add_meta);
  m.impl("alibi_add_", alibi_add_meta_);
  m.impl("alibi_mask", alibi_mask_meta);
  m.impl("alibi_slopes_backward", alibi_slopes_backward_meta);
}

}  // namespace posenc
