#include <attention/blockwise.h>
#include <attention/merge.h>
#include <contract/alibi.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <limits>

namespace posenc::attention {
namespace {

using at::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Scores of a block of rows, 32 MiB in float32: enough rows for matrix products to be efficient, and next to nothing
/// beside q, k and v of a length at which memory matters. A single row is never divided.
constexpr int64_t kBlockElements = int64_t{1} << 23;

/// On a CPU what caches hold, 2 MiB, unless that is too few rows: 9 to 12 ms for both passes instead of 13 to 17, measured
/// on two cores with four heads of 64 and 512 causal tokens.
constexpr int64_t kCachedElements = int64_t{1} << 19;
constexpr int64_t kFewRows = 64;

/// Rows `begin` to `end - 1` of all sequences, and the keys that any of them may see: the first so many.
struct Block {
  int64_t begin, end, keys;
  Tensor distances;  // [1 or B, 1, rows, keys]
  Tensor hidden;     // the same of bool, or undefined

  int64_t rows() const { return end - begin; }
};

/// One call cut into blocks. Matrices of heads that share keys are stacked: `[B * Hk, G * rows, D]`, G = Hq / Hk.
class Blocks {
 public:
  explicit Blocks(const Padded& call)
      : call_(call),
        dtype_(contract::alibi_slopes_dtype(call.q.scalar_type())),
        group_(call.q_heads() / std::max<int64_t>(1, call.k_heads())),
        k_(matrices(call.k)),
        v_(matrices(call.v)),
        slopes_(call.slopes.to(dtype_).view({1, -1, 1, 1})) {
    if (call.poison.defined()) {
      slopes_ = slopes_ + call.poison.view({-1, 1, 1, 1});
    }
    const auto integers = call.q.options().dtype(at::kLong);
    keys_ = at::arange(call.k_len(), integers);
    rows_ = at::arange(call.q_len(), integers).unsqueeze(0);
    positions_ = call.query_offset.has_value() ? rows_ + *call.query_offset
                                               : rows_ + (call.seqlens_k - call.seqlens_q).unsqueeze(1);
  }

  at::ScalarType dtype() const { return dtype_; }
  at::TensorOptions options() const { return call_.q.options().dtype(dtype_); }
  const Tensor& k() const { return k_; }
  const Tensor& v() const { return v_; }

  /// Calls `body` with every block that sees keys.
  template <typename Body>
  void for_each(const Body& body) const {
    const int64_t scores_of_row = std::max<int64_t>(1, call_.batch() * call_.q_heads() * call_.k_len());
    int64_t step = std::max<int64_t>(1, kBlockElements / scores_of_row);
    if (call_.q.is_cpu()) {
      step = std::min(step, std::max(kFewRows, kCachedElements / scores_of_row));
    }
    for (int64_t begin = 0; begin < call_.q_len(); begin += step) {
      const int64_t end = std::min(call_.q_len(), begin + step);
      int64_t keys = call_.k_len();
      if (call_.causal && call_.query_offset.has_value()) {
        keys = std::clamp<int64_t>(*call_.query_offset + end, 0, keys);
      }
      if (keys > 0 && call_.batch() * call_.q_heads() > 0) {
        body(block(begin, end, keys));
      }
    }
  }

  /// Rows of `[B, S, Hq, D]` in the dtype of sums.
  Tensor rows_of(const Tensor& x, const Block& block) const {
    return x.narrow(1, block.begin, block.rows())
        .to(dtype_)
        .transpose(1, 2)
        .reshape({call_.batch() * call_.k_heads(), group_ * block.rows(), call_.head_dim()});
  }

  /// And back, rounded once.
  void put_rows(const Tensor& matrices, const Block& block, const Tensor& x) const {
    x.narrow(1, block.begin, block.rows())
        .copy_(matrices.view({call_.batch(), call_.q_heads(), block.rows(), call_.head_dim()}).transpose(1, 2));
  }

  /// Rows of `[B, Hq, S]` beside scores.
  static Tensor column_of(const Tensor& x, const Block& block) {
    return x.narrow(2, block.begin, block.rows()).unsqueeze(-1);
  }

  Tensor k_of(const Block& block) const { return k_.narrow(1, 0, block.keys); }
  Tensor v_of(const Block& block) const { return v_.narrow(1, 0, block.keys); }

  /// Matrices `[B * Hk, G * rows, keys]` as scores `[B, Hq, rows, keys]`, and back.
  Tensor as_scores(const Tensor& x, const Block& block) const {
    return x.view({call_.batch(), call_.q_heads(), block.rows(), block.keys});
  }
  Tensor as_matrices(const Tensor& x, const Block& block) const {
    return x.view({call_.batch() * call_.k_heads(), group_ * block.rows(), block.keys});
  }

  /// Scaled, biased and masked scores of rows `q`.
  Tensor logits(const Tensor& q, const Block& block) const {
    Tensor result = as_scores(at::bmm(q, k_of(block).transpose(1, 2)), block)
                        .mul_(call_.scale)
                        .addcmul_(slopes_, block.distances, -1);
    return block.hidden.defined() ? result.masked_fill_(block.hidden, -kInfinity) : result;
  }

  /// Sums over the stacked heads, `[B * Hk, Sk, D]`, as a gradient of `x`.
  Tensor like_keys(const Tensor& matrices, const Tensor& x) const {
    Tensor result = at::empty_like(x);
    result.copy_(matrices.view({call_.batch(), call_.k_heads(), call_.k_len(), call_.head_dim()}).transpose(1, 2));
    return result;
  }

 private:
  Tensor matrices(const Tensor& x) const {
    return x.to(dtype_).transpose(1, 2).reshape({call_.batch() * call_.k_heads(), call_.k_len(), call_.head_dim()});
  }

  Block block(int64_t begin, int64_t end, int64_t keys) const {
    Block result;
    result.begin = begin;
    result.end = end;
    result.keys = keys;
    const Tensor positions = positions_.narrow(1, begin, end - begin).unsqueeze(-1);
    const Tensor columns = keys_.narrow(0, 0, keys);
    Tensor difference = positions - columns;  // [1 or B, rows, keys]
    Tensor hidden;
    const auto hide = [&hidden](const Tensor& more) { hidden = hidden.defined() ? hidden.logical_or(more) : more; };
    if (call_.causal) {
      hide(difference < 0);
    }
    if (call_.seqlens_k.defined()) {
      hide(columns >= call_.seqlens_k.view({-1, 1, 1}));
    }
    if (call_.seqlens_q.defined()) {
      hide(rows_.narrow(1, begin, end - begin).unsqueeze(-1) >= call_.seqlens_q.view({-1, 1, 1}));
    }
    result.distances = difference.abs_().to(dtype_).unsqueeze(1);
    if (hidden.defined()) {
      result.hidden = hidden.unsqueeze(1);
    }
    return result;
  }

  // Sums keep their dtype in an autocast region too.
  c10::impl::ExcludeDispatchKeyGuard no_autocast_{c10::autocast_dispatch_keyset};
  const Padded& call_;
  at::ScalarType dtype_;
  int64_t group_;
  Tensor k_, v_, slopes_, keys_, rows_, positions_;
};

/// Probabilities and the gradient of the logits of one block.
struct BlockGradient {
  Tensor p, ds;
};

/// What the backward passes have in common. `shift` is `[B, Hq, S]`, what is subtracted of dP in each row; or undefined.
BlockGradient block_gradient(
    const Blocks& blocks,
    const Block& block,
    const Tensor& q,
    const Tensor& grad,
    const Tensor& lse,
    const Tensor& shift) {
  BlockGradient result;
  result.p = blocks.logits(q, block).sub_(Blocks::column_of(lse, block)).exp_();
  result.ds = blocks.as_scores(at::bmm(grad, blocks.v_of(block).transpose(1, 2)), block);
  if (shift.defined()) {
    result.ds.sub_(Blocks::column_of(shift, block));
  }
  result.ds.mul_(result.p);
  return result;
}

Tensor row_shift(const Blocks& blocks, const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out) {
  Tensor shift = (grad_out.to(blocks.dtype()) * out).sum(-1).transpose(1, 2);
  return grad_lse.defined() ? shift - grad_lse : shift;
}

/// Terms of the gradient of the slopes, summed in float64. dS of a row sums up to the gradient of its lse, but for the
/// rounding of `out`, which is half where q is: times a distance of thousands it would be larger than the gradient. So
/// distances are counted from their mean, which takes it out.
void add_slope_terms(const Tensor& total, const BlockGradient& gradient, const Tensor& grad_lse, const Block& block) {
  const Tensor means = (gradient.p * block.distances).sum(-1, /*keepdim=*/true);
  total.sub_((gradient.ds * (block.distances - means)).sum({0, 2, 3}, /*keepdim=*/false, at::kDouble));
  if (grad_lse.defined()) {
    total.sub_((Blocks::column_of(grad_lse, block) * means).sum({0, 2, 3}, /*keepdim=*/false, at::kDouble));
  }
}

Tensor zero_slopes(const Padded& call) {
  return at::zeros({call.q_heads()}, call.q.options().dtype(at::kDouble));
}

}  // namespace

std::tuple<Tensor, Tensor> blockwise(const Padded& call) {
  const Blocks blocks(call);
  Tensor out = at::empty_like(call.q).zero_();
  Tensor lse = at::empty({call.batch(), call.q_heads(), call.q_len()}, blocks.options()).fill_(-kInfinity);
  blocks.for_each([&](const Block& block) {
    Tensor p = blocks.logits(blocks.rows_of(call.q, block), block);
    const Tensor sums = at::logsumexp(p, -1, /*keepdim=*/true);
    p.sub_(finite(sums)).exp_();
    Blocks::column_of(lse, block).copy_(sums);
    blocks.put_rows(at::bmm(blocks.as_matrices(p, block), blocks.v_of(block)), block, out);
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
  const Tensor shift = row_shift(blocks, grad_out, grad_lse, out);
  const Tensor sums = finite(lse);
  Tensor grad_q = at::empty_like(call.q).zero_();
  const Tensor grad_k = at::zeros(blocks.k().sizes(), blocks.options());
  const Tensor grad_v = at::zeros(blocks.v().sizes(), blocks.options());
  const Tensor grad_slopes = slopes_grad ? zero_slopes(call) : Tensor();
  blocks.for_each([&](const Block& block) {
    const Tensor q = blocks.rows_of(call.q, block);
    const Tensor grad = blocks.rows_of(grad_out, block);
    const BlockGradient gradient = block_gradient(blocks, block, q, grad, sums, shift);
    if (slopes_grad) {
      add_slope_terms(grad_slopes, gradient, grad_lse, block);
    }
    const Tensor weights = blocks.as_matrices(gradient.ds, block);
    blocks.put_rows(at::bmm(weights, blocks.k_of(block)).mul_(call.scale), block, grad_q);
    grad_k.narrow(1, 0, block.keys).baddbmm_(weights.transpose(1, 2), q, /*beta=*/1, /*alpha=*/call.scale);
    grad_v.narrow(1, 0, block.keys).baddbmm_(blocks.as_matrices(gradient.p, block).transpose(1, 2), grad);
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
    put(1, gradient.p * block.distances);
    put(2, gradient.ds);
    put(3, gradient.ds * block.distances);
  });
  return result;
}

}  // namespace posenc::attention
