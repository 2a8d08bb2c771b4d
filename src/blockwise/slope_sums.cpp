#include <blockwise/blocks.h>
#include <blockwise/slope_sums.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/zeros.h>

namespace posenc::blockwise {

using at::Tensor;

Tensor blockwise_slope_sums(const Padded& call, const Tensor& grad_out, const Tensor& lse) {
  const Blocks blocks(call);
  const Tensor sums = finite(lse);
  const Tensor result = at::zeros({4, call.batch(), call.q_heads(), call.q_len()}, call.q.options().dtype(at::kDouble));
  blocks.for_each([&](const Block& block) {
    const Logits logits = blocks.logits(blocks.rows_of(call.q, block), block);
    const Tensor p = logits.values.sub_(Blocks::column_of(sums, block)).exp_();
    const Tensor ds = blocks.product(blocks.rows_of(grad_out, block), blocks.finite_v(block), block).mul_(p);
    const Tensor rows = result.narrow(-1, block.begin, block.rows());
    const auto put = [&rows](int64_t sum, const Tensor& terms) {
      rows.select(0, sum).copy_(terms.sum(-1, /*keepdim=*/false, at::kDouble));
    };
    put(0, p);
    put(1, p * logits.distances);
    put(2, ds);
    put(3, ds * logits.distances);
  });
  return result;
}

}  // namespace posenc::blockwise
