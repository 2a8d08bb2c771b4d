#include <blockwise/blocks.h>
#include <blockwise/slopes_gradient.h>
#include <cuda/detail/attention_options.h>
#include <cuda/detail/rows_attention.h>
#include <cuda/kernels.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace posenc::cuda {
namespace {

using at::Tensor;
using blockwise::Block;
using blockwise::Blocks;
using blockwise::kInfinity;
using blockwise::Padded;

int32_t number(int64_t value) {
  return static_cast<int32_t>(value);
}

/// The options of a call for the kernels. Tensors of the call must outlive the launches.
class RowKernels {
 public:
  RowKernels(const Padded& call, const Blocks& blocks)
      : dtype_(blocks.dtype() == at::kDouble ? DType::float64 : DType::float32) {
    if (call.slopes.defined()) {
      slopes_ = call.slopes.to(blocks.dtype()).contiguous();
    }
    set_slopes(problem_, slopes_);
    set_scores(problem_, call);
    const auto lengths = [](const Tensor& given, Tensor& dense) -> const int64_t* {
      if (!given.defined()) {
        return nullptr;
      }
      dense = given.contiguous();
      return dense.const_data_ptr<int64_t>();
    };
    problem_.seqlens_q = lengths(call.seqlens_q, seqlens_q_);
    problem_.seqlens_k = lengths(call.seqlens_k, seqlens_k_);
    problem_.batch = number(call.batch());
    problem_.q_len = number(call.q_len());
    problem_.k_len = number(call.k_len());
    problem_.q_heads = number(call.q_heads());
    problem_.group = number(call.q_heads() / std::max<int64_t>(1, call.k_heads()));
    problem_.head_dim = number(call.head_dim());
  }

  /// Replaces products of queries and keys by probabilities, and writes the lse of the rows to `lse`, `[B, Hq, Sq]`.
  void softmax(const Block& block, const Tensor& scores, const Tensor& lse) const {
    AttentionRowsProblem p = of_block(block, scores);
    p.lse = lse.mutable_data_ptr();
    attention_softmax_rows(p, dtype_);
  }

  /// Adds the values of `v`, `[B * Hk, Sk, D]`, that are infinite or NaN and that rows see to their outputs, the
  /// products of probabilities and finite values.
  void add_infinities(const Block& block, const Tensor& v, const Tensor& infinite, const Tensor& rows) const {
    AttentionRowsProblem p = of_block(block, {});
    p.values = v.const_data_ptr();
    p.infinite = infinite.mutable_data_ptr<int32_t>();
    p.out = rows.mutable_data_ptr();
    attention_add_infinities(p, dtype_);
  }

  /// int32 `[B * Hk]`: whether `v`, `[B * Hk, Sk, D]`, has values that are infinite or NaN in a head.
  Tensor find_infinities(const Tensor& v) const {
    Tensor infinite = at::zeros({v.size(0)}, v.options().dtype(at::kInt));
    if (v.numel() > 0) {
      AttentionRowsProblem p = problem_;
      p.values = v.const_data_ptr();
      p.infinite = infinite.mutable_data_ptr<int32_t>();
      attention_find_infinities(p, dtype_);
    }
    return infinite;
  }

  /// Replaces products of queries and keys by probabilities P, and those of the gradient of the output and values, dP,
  /// by the gradient of the scaled products of queries and keys. Overwrites the rows of the block in `row_sums`.
  /// @param delta  `[B, Hq, Sq]`; undefined means zero.
  /// @param row_sums  float64 `[4, B, Hq, Sq]`: sums of P, P d, P dP and P dP d; may be undefined.
  void gradient(
      const Block& block,
      const Tensor& scores,
      const Tensor& dp,
      const Tensor& lse,
      const Tensor& delta,
      const Tensor& row_sums) const {
    AttentionRowsProblem p = of_block(block, scores);
    p.gradients = dp.mutable_data_ptr();
    p.lse = const_cast<void*>(lse.const_data_ptr());  // NOLINT(cppcoreguidelines-pro-type-const-cast): it is read
    p.delta = delta.defined() ? delta.const_data_ptr() : nullptr;
    p.row_sums = row_sums.defined() ? row_sums.mutable_data_ptr<double>() : nullptr;
    attention_gradient_rows(p, dtype_);
  }

 private:
  AttentionRowsProblem of_block(const Block& block, const Tensor& scores) const {
    AttentionRowsProblem p = problem_;
    p.first_row = number(block.begin);
    p.rows = number(block.rows());
    p.first_key = number(block.first_key);
    p.keys = number(block.keys);
    p.scores = scores.defined() ? scores.mutable_data_ptr() : nullptr;
    return p;
  }

  DType dtype_;
  Tensor slopes_, seqlens_q_, seqlens_k_;
  AttentionRowsProblem problem_{};
};

Tensor zero_row_sums(const Padded& call) {
  return at::zeros({4, call.batch(), call.q_heads(), call.q_len()}, call.q.options().dtype(at::kDouble));
}

}  // namespace

std::tuple<Tensor, Tensor> rows_attention(const Padded& call) {
  const Blocks blocks(call);
  const RowKernels kernels(call, blocks);
  const Tensor infinite = blocks.hides_values() ? kernels.find_infinities(blocks.v()) : Tensor();
  Tensor out = at::empty_like(call.q).zero_();
  Tensor lse = at::empty({call.batch(), call.q_heads(), call.q_len()}, blocks.options()).fill_(-kInfinity);
  blocks.for_each([&](const Block& block) {
    const Tensor scores = blocks.product(blocks.rows_of(call.q, block), blocks.k(block), block);
    kernels.softmax(block, scores, lse);
    const Tensor rows = at::bmm(blocks.as_matrices(scores, block), blocks.finite_v(block));
    if (infinite.defined()) {
      kernels.add_infinities(block, blocks.v(), infinite, rows);
    }
    blocks.put_rows(rows, block, out);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rows_attention_backward(
    const Padded& call,
    const Tensor& grad_out,
    const Tensor& grad_lse,
    const Tensor& out,
    const Tensor& lse,
    bool slopes_grad) {
  const Blocks blocks(call);
  const RowKernels kernels(call, blocks);
  const Tensor delta = blocks.row_shift(grad_out, grad_lse, out).contiguous();
  const Tensor dense_lse = lse.contiguous();
  Tensor grad_q = at::empty_like(call.q).zero_();
  const Tensor grad_k = blocks.zeros_of_keys();
  const Tensor grad_v = blocks.zeros_of_keys();
  const Tensor row_sums = slopes_grad ? zero_row_sums(call) : Tensor();
  blocks.for_each([&](const Block& block) {
    const Tensor q = blocks.rows_of(call.q, block);
    const Tensor grad = blocks.rows_of(grad_out, block);
    const Tensor p = blocks.product(q, blocks.k(block), block);
    const Tensor ds = blocks.product(grad, blocks.finite_v(block), block);
    kernels.gradient(block, p, ds, dense_lse, delta, row_sums);
    const Tensor weights = blocks.as_matrices(ds, block);
    blocks.put_rows(at::bmm(weights, blocks.finite_k(block)).mul_(call.scale), block, grad_q);
    Blocks::keys_of(grad_k, block).baddbmm_(weights.transpose(1, 2), q, /*beta=*/1, /*alpha=*/call.scale);
    Blocks::keys_of(grad_v, block).baddbmm_(blocks.as_matrices(p, block).transpose(1, 2), grad);
  });
  Tensor grad_slopes;
  if (slopes_grad) {
    grad_slopes = blockwise::slopes_gradient(row_sums, grad_lse, call.slopes).to(blocks.dtype());
  }
  return {grad_q, blocks.like_keys(grad_k, call.k), blocks.like_keys(grad_v, call.v), grad_slopes};
}

Tensor rows_attention_slope_sums(const Padded& call, const Tensor& grad_out, const Tensor& lse) {
  const Blocks blocks(call);
  const RowKernels kernels(call, blocks);
  const Tensor dense_lse = lse.contiguous();
  Tensor row_sums = zero_row_sums(call);
  blocks.for_each([&](const Block& block) {
    const Tensor scores = blocks.product(blocks.rows_of(call.q, block), blocks.k(block), block);
    const Tensor dp = blocks.product(blocks.rows_of(grad_out, block), blocks.finite_v(block), block);
    kernels.gradient(block, scores, dp, dense_lse, /*delta=*/{}, row_sums);
  });
  return row_sums;
}

}  // namespace posenc::cuda
