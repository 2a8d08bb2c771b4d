#include <blockwise/slopes_gradient.h>

#include <ATen/TensorOperators.h>

namespace posenc::blockwise {

using at::Tensor;

Tensor slopes_gradient(const Tensor& sums, const Tensor& grad_lse, const Tensor& slopes) {
  const Tensor p = sums.select(0, 0);
  const Tensor mean = (sums.select(0, 1) / p).masked_fill_(p == 0, 0);
  Tensor terms = sums.select(0, 3) - sums.select(0, 2) * mean;
  if (grad_lse.defined()) {
    terms.add_(grad_lse * mean);
  }
  const Tensor of_sequences = terms.sum(2).neg_();
  return slopes.dim() == 1 ? of_sequences.sum(0) : of_sequences;
}

}  // namespace posenc::blockwise
