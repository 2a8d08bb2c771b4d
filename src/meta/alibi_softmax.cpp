#include <meta/detail/symbolic.h>
#include <ops/alibi_softmax.h>
#include <ops/dispatch.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

Tensor alibi_softmax_meta(const AlibiSoftmaxArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::alibi_softmax_problem, a);
  return at::empty_like(a.scores);
}

std::tuple<Tensor, Tensor> alibi_softmax_backward_meta(const AlibiSoftmaxBackwardArguments<c10::SymInt>& a) {
  meta::check_unless_symbolic(arguments::alibi_softmax_backward_problem, a);
  Tensor slopes;
  if (a.slopes_grad) {
    slopes = at::empty_symint(
        {a.probs.sym_size(-3)}, a.probs.options().dtype(arguments::alibi_slopes_dtype(a.probs.scalar_type())));
  }
  return {at::empty_like(a.probs), slopes};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_softmax", kernel<alibi_softmax_meta>);
  m.impl("alibi_softmax_backward", kernel<alibi_softmax_backward_meta>);
}

}  // namespace posenc
