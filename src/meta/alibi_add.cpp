#include <contract/alibi.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

bool is_symbolic(const Tensor& scores, const Tensor& slopes) {
  return meta::has_symbolic_sizes(scores) || meta::has_symbolic_sizes(slopes);
}

Tensor alibi_add_meta(const Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  if (!is_symbolic(scores, slopes)) {
    contract::alibi_add_problem({"posenc::alibi_add", causal, query_offset}, scores, slopes);
  }
  return at::empty_like(scores);
}

void alibi_add_meta_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  if (!is_symbolic(scores, slopes)) {
    contract::alibi_add_in_place_problem({"posenc::alibi_add_", causal, query_offset}, scores, slopes);
  }
}

Tensor alibi_mask_meta(const Tensor& grad, std::optional<int64_t> query_offset) {
  if (!meta::has_symbolic_sizes(grad)) {
    contract::alibi_mask_problem({"posenc::alibi_mask", /*causal=*/true, query_offset}, grad);
  }
  return at::empty_like(grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_add", alibi_add_meta);
  m.impl("alibi_add_", alibi_add_meta_);
  m.impl("alibi_mask", alibi_mask_meta);
}

}  // namespace posenc
