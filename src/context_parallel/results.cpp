#include <arguments/alibi.h>
#include <arguments/attention_problem.h>
#include <blockwise/blocks.h>
#include <context_parallel/results.h>
#if POSENC_CUDA
#include <cuda/detail/attention_parts.h>
#endif

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logaddexp.h>

namespace posenc::context_parallel {
namespace {

using at::Tensor;

/// Writes the results over the keys of parts 1 and 2.
void merge(
    const Tensor& out_1,
    const Tensor& lse_1,
    const Tensor& out_2,
    const Tensor& lse_2,
    const Tensor& out,
    const Tensor& lse) {
#if POSENC_CUDA
  if (out.is_cuda()) {
    cuda::merge_attention_parts({out_1, lse_1}, {out_2, lse_2}, {out, lse});
    return;
  }
#endif
  const auto beside_out = [](const Tensor& x) { return x.transpose(1, 2).unsqueeze(-1); };
  const Tensor total = at::logaddexp(lse_1, lse_2);
  const Tensor sums = blockwise::finite(total);
  out.copy_((out_1 * beside_out((lse_1 - sums).exp_())).addcmul_(out_2, beside_out((lse_2 - sums).exp_())));
  lse.copy_(total);
}

/// Writes the sum of `terms`.
void sum(const std::vector<Tensor>& terms, at::ScalarType dtype, const Tensor& result) {
#if POSENC_CUDA
  if (result.is_cuda()) {
    cuda::sum_attention_parts(terms, dtype, result);
    return;
  }
#endif
  Tensor total = terms.front().to(arguments::alibi_slopes_dtype(dtype), /*non_blocking=*/false, /*copy=*/true);
  for (size_t i = 1; i < terms.size(); ++i) {
    total.add_(terms[i]);
  }
  result.copy_(total);
}

}  // namespace

void MergedRows::add(const Tensor& out, const Tensor& lse) {
  if (out_.defined()) {
    const Tensor merged = at::empty(out.sizes(), lse.options());
    const Tensor total = at::empty_like(lse);
    merge(out_, lse_, last_out_, last_lse_, merged, total);
    out_ = merged;
    lse_ = total;
  } else {
    out_ = last_out_;
    lse_ = last_lse_;
  }
  last_out_ = out;
  last_lse_ = lse;
}

void MergedRows::finish(const Tensor& out, const Tensor& lse) const {
  if (out_.defined()) {
    merge(out_, lse_, last_out_, last_lse_, out, lse);
  } else {
    out.copy_(last_out_);
    lse.copy_(last_lse_);
  }
}

void GradientSum::add(const Tensor& term) {
  if (terms_.size() == kMostSumTerms) {  // as many as one kernel adds
    const Tensor total = at::empty(term.sizes(), term.options().dtype(arguments::alibi_slopes_dtype(dtype_)));
    sum(terms_, dtype_, total);
    terms_ = {total};
  }
  terms_.push_back(term);
}

void GradientSum::finish(const Tensor& result) const {
  sum(terms_, dtype_, result);
}

}  // namespace posenc::context_parallel
