#include <arguments/alibi.h>
#include <meta/detail/symbolic.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

// An argument by value is how the dispatcher knows a symbol.
// NOLINTBEGIN(performance-unnecessary-value-param)
namespace posenc {
namespace {

using at::Tensor;
using meta::has_symbolic_sizes;

Tensor alibi_softmax_meta(
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<c10::SymInt> query_offset) {
  const bool symbolic = has_symbolic_sizes(scores) || has_symbolic_sizes(slopes) ||
      (key_padding_mask.has_value() && has_symbolic_sizes(*key_padding_mask)) || meta::is_symbolic(query_offset);
  if (!symbolic) {
    arguments::alibi_softmax_problem(
        {"posenc::alibi_softmax", causal, meta::concrete(query_offset)}, scores, slopes, scale, key_padding_mask);
  }
  return at::empty_like(scores);
}

std::tuple<Tensor, Tensor> alibi_softmax_backward_meta(
    const Tensor& grad,
    const Tensor& probs,
    double scale,
    bool causal,
    std::optional<c10::SymInt> query_offset,
    bool slopes_grad) {
  if (!meta::any_symbolic({grad, probs}) && !meta::is_symbolic(query_offset)) {
    arguments::alibi_softmax_backward_problem(
        {"posenc::alibi_softmax_backward", causal, meta::concrete(query_offset)}, grad, probs, scale);
  }
  Tensor slopes;
  if (slopes_grad) {
    slopes = at::empty_symint(
        {probs.sym_size(-3)}, probs.options().dtype(arguments::alibi_slopes_dtype(probs.scalar_type())));
  }
  return {at::empty_like(probs), slopes};
}

}  // namespace
// NOLINTEND(performance-unnecessary-value-param)

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_softmax", alibi_softmax_meta);
  m.impl("alibi_softmax_backward", alibi_softmax_backward_meta);
}

}  // namespace posenc
