#include <meta/detail/symbolic.h>
#include <ops/alibi_bias.h>
#include <ops/dispatch.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

Tensor alibi_bias_meta(const AlibiBiasArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::alibi_bias_problem, a);
  return at::empty_symint({a.slopes.sym_size(0), a.q_len, a.k_len}, a.slopes.options().dtype(a.dtype));
}

Tensor alibi_add_meta(const AlibiAddArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::alibi_add_problem, a);
  return at::empty_like(a.scores);
}

void alibi_add_meta_(const AlibiAddArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::alibi_add_in_place_problem, a);
}

Tensor alibi_mask_meta(const AlibiMaskArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::alibi_mask_problem, a);
  return at::empty_like(a.grad);
}

Tensor alibi_slopes_backward_meta(const AlibiSlopesBackwardArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::alibi_slopes_backward_shape, a);
  return at::empty_symint(
      {a.grad.sym_size(-3)}, a.grad.options().dtype(arguments::alibi_slopes_dtype(a.grad.scalar_type())));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_bias", kernel<alibi_bias_meta>);
  m.impl("alibi_add", kernel<alibi_add_meta>);
  m.impl("alibi_add_", kernel<alibi_add_meta_>);
  m.impl("alibi_mask", kernel<alibi_mask_meta>);
  m.impl("alibi_slopes_backward", kernel<alibi_slopes_backward_meta>);
}

}  // namespace posenc
