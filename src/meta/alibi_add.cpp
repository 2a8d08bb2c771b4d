#include <contract/alibi.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

// An argument by value is how the dispatcher knows a symbol.
// NOLINTBEGIN(performance-unnecessary-value-param)
namespace posenc {
namespace {

using at::Tensor;

bool is_symbolic(const Tensor& scores, const Tensor& slopes, const std::optional<c10::SymInt>& query_offset) {
  return meta::any_symbolic({scores, slopes}) || meta::is_symbolic(query_offset);
}

Tensor alibi_add_meta(
    const Tensor& scores,
    const Tensor& slopes,
    bool causal,
    std::optional<c10::SymInt> query_offset) {
  if (!is_symbolic(scores, slopes, query_offset)) {
    contract::alibi_add_problem({"posenc::alibi_add", causal, meta::concrete(query_offset)}, scores, slopes);
  }
  return at::empty_like(scores);
}

void alibi_add_meta_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<c10::SymInt> query_offset) {
  if (!is_symbolic(scores, slopes, query_offset)) {
    contract::alibi_add_in_place_problem({"posenc::alibi_add_", causal, meta::concrete(query_offset)}, scores, slopes);
  }
}

Tensor alibi_mask_meta(const Tensor& grad, std::optional<c10::SymInt> query_offset) {
  if (!meta::has_symbolic_sizes(grad) && !meta::is_symbolic(query_offset)) {
    contract::alibi_mask_problem({"posenc::alibi_mask", /*causal=*/true, meta::concrete(query_offset)}, grad);
  }
  return at::empty_like(grad);
}

}  // namespace
// NOLINTEND(performance-unnecessary-value-param)

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_add", alibi_add_meta);
  m.impl("alibi_add_", alibi_add_meta_);
  m.impl("alibi_mask", alibi_mask_meta);
}

}  // namespace posenc
