#include <arguments/alibi_attention.h>
#include <meta/detail/attention_outputs.h>
#include <meta/detail/symbolic.h>
#include <ops/alibi_attention.h>
#include <ops/dispatch.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;
using meta::empty_lse;

/// `check_arguments(op, arguments, options)`, unless one of the arguments is a symbol.
template <typename Check, typename Arguments>
void check(
    const Check& check_arguments,
    const char* op,
    const Arguments& arguments,
    const SymbolicAttentionOptions& options) {
  if (!meta::any_symbol(arguments, options)) {
    check_arguments(op, arguments, meta::numbers(options));
  }
}

std::tuple<Tensor, Tensor> alibi_attention_meta(
    const SymbolicAttentionOptions& options,
    const AttentionTensors& inputs) {
  check(arguments::check_attention, "posenc::alibi_attention", inputs, options);
  return {at::empty_like(inputs.q), empty_lse(inputs.q)};
}

AttentionGradients alibi_attention_backward_meta(
    const SymbolicAttentionOptions& options,
    const AttentionBackwardArguments& a,
    bool slopes_grad) {
  check(arguments::check_attention_backward, "posenc::alibi_attention_backward", a, options);
  return {
      at::empty_like(a.q), at::empty_like(a.k), at::empty_like(a.v),
      slopes_grad ? meta::empty_slopes_gradient(a.q, a.slopes) : Tensor()};
}

AttentionSecondGradients alibi_attention_double_backward_meta(
    const SymbolicAttentionOptions& options,
    const AttentionDoubleBackwardArguments& a) {
  check(arguments::check_attention_double_backward, "posenc::alibi_attention_double_backward", a, options);
  return {at::empty_like(a.q), empty_lse(a.q),      at::empty_like(a.q),
          at::empty_like(a.k), at::empty_like(a.v), meta::empty_slopes_gradient(a.q, a.slopes)};
}

Tensor alibi_attention_slope_sums_meta(const SymbolicAttentionOptions& options, const AttentionSlopeSumsArguments& a) {
  check(arguments::check_attention_slope_sums, "posenc::alibi_attention_slope_sums", a, options);
  return at::empty_symint({4, a.q.sym_size(0), a.q.sym_size(2), a.q.sym_size(1)}, a.q.options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_attention", kernel<alibi_attention_meta>);
  m.impl("alibi_attention_backward", kernel<alibi_attention_backward_meta>);
  m.impl("alibi_attention_double_backward", kernel<alibi_attention_double_backward_meta>);
  m.impl("alibi_attention_slope_sums", kernel<alibi_attention_slope_sums_meta>);
}

}  // namespace posenc
