#include <blockwise/merge.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/logaddexp.h>

#include <limits>

namespace posenc::blockwise {
namespace {

using at::Tensor;

/// `[B, H, S]` as `[B, S, H, 1]`, which broadcasts with out.
Tensor beside_out(const Tensor& x) {
  return x.transpose(1, 2).unsqueeze(-1);
}

}  // namespace

Tensor finite(const Tensor& lse) {
  return lse.masked_fill(lse == -std::numeric_limits<double>::infinity(), 0);
}

void MergedRows::add(const Tensor& out, const Tensor& lse) {
  if (!out_.defined()) {
    out_ = out;
    lse_ = lse;
    return;
  }
  out_ = out_.to(lse.scalar_type());
  const Tensor total = at::logaddexp(lse_, lse);
  const Tensor sums = finite(total);
  out_.mul_(beside_out((lse_ - sums).exp_())).addcmul_(out, beside_out((lse - sums).exp_()));
  lse_ = total;
}

}  // namespace posenc::blockwise
