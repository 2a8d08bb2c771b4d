#include <blockwise/blocks.h>
#include <blockwise/blockwise.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace posenc::blockwise {
namespace {

using at::Tensor;

/// Probabilities, the gradient of the logits, that of the scaled scores, and distances of one block. Without softcap
/// `ds` and `dscaled` are the same tensor.
struct BlockGradient {
  Tensor p, ds, dscaled, distances;
};

/// @param shift  `rowsum(dout out) - dlse`, `[B, Hq, Sq]`; undefined means zero.
BlockGradient block_gradient(
    const Blocks& blocks,
    const Block& block,
    const Tensor& q,
    const Tensor& grad,
    const Tensor& lse,
    const Tensor& shift) {
  BlockGradient result;
  const Logits logits = blocks.logits(q, block);
  result.p = logits.values.sub_(Blocks::column_of(lse, block)).exp_();
  result.ds = blocks.product(grad, blocks.finite_v(block), block);
  if (shift.defined()) {
    result.ds.sub_(Blocks::column_of(shift, block));
  }
  result.ds.mul_(result.p);
  result.dscaled = through_softcap(result.ds, logits);
  result.distances = logits.distances;
  return result;
}

/// Adds the terms of a block to the gradient of the slopes, in float64. In exact arithmetic the sum of dS over a row is
/// the gradient of its lse. It is not here, because `out` is rounded to the dtype of q. That error times a distance of
/// thousands is larger than the gradient. Subtracting the mean distance of the row from the distances removes it.
void add_slope_terms(
    const Blocks& blocks,
    const Tensor& total,
    const BlockGradient& gradient,
    const Tensor& grad_lse,
    const Block& block) {
  const Tensor means = (gradient.p * gradient.distances).sum(-1, /*keepdim=*/true);
  total.sub_(blocks.sums_by_slope(gradient.ds * (gradient.distances - means)));
  if (grad_lse.defined()) {
    total.sub_(blocks.sums_by_slope(Blocks::column_of(grad_lse, block) * means));
  }
}

Tensor zero_slopes(const Padded& call) {
  return at::zeros(call.slopes.sizes(), call.q.options().dtype(at::kDouble));
}

}  // namespace

std::tuple<Tensor, Tensor> blockwise(const Padded& call) {
  const Blocks blocks(call);
  const Tensor infinities = blocks.infinities();
  Tensor out = at::empty_like(call.q).zero_();
  Tensor lse = at::empty({call.batch(), call.q_heads(), call.q_len()}, blocks.options()).fill_(-kInfinity);
  blocks.for_each([&](const Block& block) {
    Tensor p = blocks.logits(blocks.rows_of(call.q, block), block).values;
    const Tensor sums = at::logsumexp(p, -1, /*keepdim=*/true);
    p.sub_(finite(sums)).exp_();
    Blocks::column_of(lse, block).copy_(sums);
    const Tensor rows = at::bmm(blocks.as_matrices(p, block), blocks.finite_v(block));
    blocks.add_visible_infinities(infinities, rows, block);
    blocks.put_rows(rows, block, out);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> blockwise_backward(
    const Padded& call,
    const Tensor& grad_out,
    const Tensor& grad_lse,
    const Tensor& out,
    const Tensor& lse,
    bool slopes_grad) {
  const Blocks blocks(call);
  const Tensor shift = blocks.row_shift(grad_out, grad_lse, out);
  const Tensor sums = finite(lse);
  Tensor grad_q = at::empty_like(call.q).zero_();
  const Tensor grad_k = blocks.zeros_of_keys();
  const Tensor grad_v = blocks.zeros_of_keys();
  const Tensor grad_slopes = slopes_grad ? zero_slopes(call) : Tensor();
  blocks.for_each([&](const Block& block) {
    const Tensor q = blocks.rows_of(call.q, block);
    const Tensor grad = blocks.rows_of(grad_out, block);
    const BlockGradient gradient = block_gradient(blocks, block, q, grad, sums, shift);
    if (slopes_grad) {
      add_slope_terms(blocks, grad_slopes, gradient, grad_lse, block);
    }
    const Tensor weights = blocks.as_matrices(gradient.dscaled, block);
    blocks.put_rows(at::bmm(weights, blocks.finite_k(block)).mul_(call.scale), block, grad_q);
    Blocks::keys_of(grad_k, block).baddbmm_(weights.transpose(1, 2), q, /*beta=*/1, /*alpha=*/call.scale);
    Blocks::keys_of(grad_v, block).baddbmm_(blocks.as_matrices(gradient.p, block).transpose(1, 2), grad);
  });
  return {
      grad_q, blocks.like_keys(grad_k, call.k), blocks.like_keys(grad_v, call.v),
      slopes_grad ? grad_slopes.to(blocks.dtype()) : Tensor()};
}

Tensor blockwise_slope_sums(const Padded& call, const Tensor& grad_out, const Tensor& lse) {
  const Blocks blocks(call);
  const Tensor sums = finite(lse);
  const Tensor result = at::zeros({4, call.batch(), call.q_heads(), call.q_len()}, call.q.options().dtype(at::kDouble));
  blocks.for_each([&](const Block& block) {
    const BlockGradient gradient = block_gradient(
        blocks, block, blocks.rows_of(call.q, block), blocks.rows_of(grad_out, block), sums, /*shift=*/Tensor());
    const Tensor rows = result.narrow(-1, block.begin, block.rows());
    const auto put = [&rows](int64_t sum, const Tensor& terms) {
      rows.select(0, sum).copy_(terms.sum(-1, /*keepdim=*/false, at::kDouble));
    };
    put(0, gradient.p);
    put(1, gradient.p * gradient.distances);
    put(2, gradient.ds);
    put(3, gradient.ds * gradient.distances);
  });
  return result;
}

}  // namespace posenc::blockwise
