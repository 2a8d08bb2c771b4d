#include <blockwise/blocks.h>
#include <blockwise/second_order.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace posenc::blockwise {
namespace {

using at::Tensor;

Tensor sum_of_rows(const Tensor& x) {
  return x.sum(-1, /*keepdim=*/true);
}

/// Adds `alpha scores^T x` to the keys of a block in `total`.
void add_to_keys(
    const Blocks& blocks,
    const Block& block,
    const Tensor& total,
    const Tensor& scores,
    const Tensor& x,
    double alpha) {
  Blocks::keys_of(total, block).baddbmm_(blocks.as_matrices(scores, block).transpose(1, 2), x, /*beta=*/1, alpha);
}

}  // namespace

SecondOrderResult blockwise_double_backward(
    const Padded& call,
    const Tensor& grad_out,
    const Tensor& grad_lse,
    const SecondOrderGrads& grads) {
  const Blocks blocks(call);
  const double scale = call.scale;
  // b and c of second_order.h, as key matrices.
  const Tensor b = grads.k.defined() ? blocks.key_matrices(grads.k) : Tensor();
  const Tensor c = grads.v.defined() ? blocks.key_matrices(grads.v) : Tensor();
  SecondOrderResult result;
  result.grad_out = at::zeros_like(call.q);
  result.grad_lse = at::zeros({call.batch(), call.q_heads(), call.q_len()}, blocks.options());
  result.q = at::zeros_like(call.q);
  const Tensor k_sums = blocks.zeros_of_keys();
  const Tensor v_sums = blocks.zeros_of_keys();
  Tensor slopes_sums;
  if (call.slopes.defined()) {
    slopes_sums = at::zeros(call.slopes.sizes(), call.q.options().dtype(at::kDouble));
  }
  blocks.for_each([&](const Block& block) {
    const Tensor q = blocks.rows_of(call.q, block);
    const Tensor grad = blocks.rows_of(grad_out, block);
    const Tensor k = blocks.finite_k(block);
    const Tensor v = blocks.finite_v(block);
    const Logits logits = blocks.logits(q, block);
    Tensor p = logits.values;
    p.sub_(finite(at::logsumexp(p, -1, /*keepdim=*/true))).exp_();
    const Tensor dp = blocks.product(grad, v, block);
    Tensor ds = dp - sum_of_rows(p * dp);  // dP - delta, and dS below
    if (grad_lse.defined()) {
      ds.add_(Blocks::column_of(grad_lse, block));
    }
    Tensor scaled = at::zeros_like(p);  // scale (a_i k_j + q_i b_j)
    Tensor a;
    if (grads.q.defined()) {
      a = blocks.rows_of(grads.q, block);
      scaled.add_(blocks.product(a, k, block), scale);
    }
    if (b.defined()) {
      scaled.add_(blocks.product(q, Blocks::keys_of(b, block), block), scale);
    }
    Tensor u = through_softcap(scaled, logits);
    if (grads.slopes.defined()) {
      u.addcmul_(Blocks::beside_scores(grads.slopes.to(blocks.dtype())), logits.distances, -1);
    }
    const Tensor mu = sum_of_rows(p * u);
    Tensor t = ds * u - mu * dp;  // R, and T below
    Tensor grad_rows = at::zeros_like(q);
    if (c.defined()) {
      const Tensor c_block = Blocks::keys_of(c, block);
      t.add_(blocks.product(grad, c_block, block));
      grad_rows.add_(at::bmm(blocks.as_matrices(p, block), c_block));
    }
    t.sub_(sum_of_rows(p * t)).mul_(p);
    ds.mul_(p);
    const Tensor centred = (u - mu).mul_(p);
    grad_rows.add_(at::bmm(blocks.as_matrices(centred, block), v));
    blocks.put_rows(grad_rows, block, result.grad_out);
    Blocks::column_of(result.grad_lse, block).copy_(mu);
    const Tensor first = through_softcap(ds, logits);
    Tensor second = through_softcap(t, logits);
    if (logits.tanh.defined()) {
      second.addcmul_(first * scaled, logits.tanh, -2 / *call.softcap);
    }
    Tensor q_rows = at::bmm(blocks.as_matrices(second, block), k);
    if (b.defined()) {
      q_rows.add_(at::bmm(blocks.as_matrices(first, block), Blocks::keys_of(b, block)));
    }
    blocks.put_rows(q_rows.mul_(scale), block, result.q);
    add_to_keys(blocks, block, k_sums, second, q, scale);
    if (a.defined()) {
      add_to_keys(blocks, block, k_sums, first, a, scale);
    }
    add_to_keys(blocks, block, v_sums, centred, grad, 1);
    if (slopes_sums.defined()) {
      slopes_sums.sub_(blocks.sums_by_slope(t * logits.distances));
    }
  });
  result.k = blocks.like_keys(k_sums, call.k);
  result.v = blocks.like_keys(v_sums, call.v);
  if (slopes_sums.defined()) {
    result.slopes = slopes_sums.to(blocks.dtype());
  }
  return result;
}

}  // namespace posenc::blockwise
