#include <arguments/alibi.h>
#include <blockwise/blocks.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/nan_to_num.h>
#include <ATen/ops/zeros.h>

namespace posenc::blockwise {
namespace {

using at::Tensor;

/// Number of scores in a block of rows, 32 MiB in float32, which is small beside q, k and v of long sequences. On a GPU
/// a block has at least `kFewestRows` rows, and twice as many where there are few heads, so that matrix products are
/// efficient. Forward pass, 16 heads of 128 channels, on an H100, with 128, 256 and 512 rows: 1.14, 1.04 and 1.08 ms
/// with batch 4 and 1,024 tokens, 67, 49 and 40 ms with batch 1 and 16,384 tokens. A row is never divided.
constexpr int64_t kBlockElements = int64_t{1} << 23;
constexpr int64_t kFewestRows = 256;
constexpr int64_t kFewestRowsOfHeads = 8192;  // of all heads together

/// The same on a CPU, where only second derivatives and sums for slope gradients use blocks: scores of 2 MiB in
/// float32, which stay in the L2 and L3 caches between two operations, but at least `kFewRows` rows. With blocks of 32
/// MiB the matrix products of attention forward and backward took 13 to 17 ms instead of 9 to 12 (two cores, four heads
/// of 64 channels, 512 causal tokens).
constexpr int64_t kCachedElements = int64_t{1} << 19;
constexpr int64_t kFewRows = 64;

}  // namespace

Tensor finite(const Tensor& lse) {
  return lse.masked_fill(lse == -kInfinity, 0);
}

Tensor through_softcap(const Tensor& grad, const Logits& logits) {
  return logits.tanh.defined() ? grad * (1 - logits.tanh.square()) : grad;
}

Blocks::Blocks(const Padded& call)
    : call_(call),
      dtype_(arguments::alibi_slopes_dtype(call.q.scalar_type())),
      group_(call.q_heads() / std::max<int64_t>(1, call.k_heads())),
      left_(call.window_left),
      right_(call.causal ? 0 : call.window_right),
      k_(key_matrices(call.k)),
      v_(key_matrices(call.v)),
      finite_v_(v_) {
  if (call.slopes.defined()) {
    slopes_ = beside_scores(call.slopes.to(dtype_));
  }
  const auto integers = call.q.options().dtype(at::kLong);
  keys_ = at::arange(call.k_len(), integers);
  rows_ = at::arange(call.q_len(), integers).unsqueeze(0);
  positions_ = call.query_offset.has_value() ? rows_ + *call.query_offset
                                             : rows_ + (call.seqlens_k - call.seqlens_q).unsqueeze(1);
  // A block has the keys that its rows see. In a block of one row the mask therefore hides no key, unless the offset
  // differs between sequences.
  const bool masked = left_.has_value() || right_.has_value();
  const bool hides_keys = masked && (call.q_len() > 1 || !call.query_offset.has_value());
  hides_values_ = call.k_len() > 0 && (hides_keys || call.seqlens_q.defined());
  if (hides_values_) {
    finite_v_ = at::nan_to_num(v_, 0, 0, 0);
  }
}

Tensor Blocks::finite_k(const Block& block) const {
  if (!finite_k_.defined()) {
    finite_k_ = hides_values_ ? at::nan_to_num(k_, 0, 0, 0) : k_;
  }
  return keys_of(finite_k_, block);
}

int64_t Blocks::rows_of_block() const {
  const int64_t scores_of_row = std::max<int64_t>(1, call_.batch() * call_.q_heads() * call_.k_len());
  const int64_t rows = std::max<int64_t>(1, kBlockElements / scores_of_row);
  return call_.q.is_cpu() ? std::min(rows, std::max(kFewRows, kCachedElements / scores_of_row))
                          : std::max(
                                rows,
                                std::clamp(
                                    kFewestRowsOfHeads / std::max<int64_t>(1, call_.batch() * call_.q_heads()),
                                    kFewestRows, 2 * kFewestRows));
}

std::pair<int64_t, int64_t> Blocks::visible_keys(int64_t begin, int64_t end) const {
  const int64_t keys = call_.k_len();
  if (!call_.query_offset.has_value()) {
    return {0, keys};
  }
  const int64_t first = left_.has_value() ? *call_.query_offset + begin - *left_ : 0;
  const int64_t last = right_.has_value() ? *call_.query_offset + end - 1 + *right_ : keys - 1;
  return {std::clamp<int64_t>(first, 0, keys), std::clamp<int64_t>(last + 1, 0, keys)};
}

Tensor Blocks::differences(const Block& block) const {
  return positions_.narrow(1, block.begin, block.rows()).unsqueeze(-1) - keys_.narrow(0, block.first_key, block.keys);
}

Tensor Blocks::hidden(const Block& block, const Tensor& differences) const {
  Tensor result;
  const auto hide = [&result](const Tensor& more) { result = result.defined() ? result.logical_or(more) : more; };
  if (left_.has_value()) {
    hide(differences > *left_);
  }
  if (right_.has_value()) {
    hide(differences < -*right_);
  }
  if (call_.seqlens_k.defined()) {
    hide(keys_.narrow(0, block.first_key, block.keys) >= call_.seqlens_k.view({-1, 1, 1}));
  }
  if (call_.seqlens_q.defined()) {
    hide(rows_.narrow(1, block.begin, block.rows()).unsqueeze(-1) >= call_.seqlens_q.view({-1, 1, 1}));
  }
  return result.defined() ? result.unsqueeze(1) : result;
}

Tensor Blocks::rows_of(const Tensor& x, const Block& block) const {
  return x.narrow(1, block.begin, block.rows())
      .to(dtype_)
      .transpose(1, 2)
      .reshape({call_.batch() * call_.k_heads(), group_ * block.rows(), call_.head_dim()});
}

void Blocks::put_rows(const Tensor& matrices, const Block& block, const Tensor& x) const {
  x.narrow(1, block.begin, block.rows())
      .copy_(matrices.view({call_.batch(), call_.q_heads(), block.rows(), call_.head_dim()}).transpose(1, 2));
}

Tensor Blocks::column_of(const Tensor& x, const Block& block) {
  return x.narrow(2, block.begin, block.rows()).unsqueeze(-1);
}

Tensor Blocks::key_matrices(const Tensor& x) const {
  return x.to(dtype_).transpose(1, 2).reshape({call_.batch() * call_.k_heads(), call_.k_len(), call_.head_dim()});
}

Tensor Blocks::like_keys(const Tensor& matrices, const Tensor& x) const {
  Tensor result = at::empty_like(x);
  result.copy_(matrices.view({call_.batch(), call_.k_heads(), call_.k_len(), call_.head_dim()}).transpose(1, 2));
  return result;
}

Tensor Blocks::zeros_of_keys() const {
  return at::zeros(k_.sizes(), options());
}

Tensor Blocks::keys_of(const Tensor& matrices, const Block& block) {
  return matrices.narrow(1, block.first_key, block.keys);
}

Tensor Blocks::as_scores(const Tensor& matrices, const Block& block) const {
  return matrices.view({call_.batch(), call_.q_heads(), block.rows(), block.keys});
}

Tensor Blocks::as_matrices(const Tensor& scores, const Block& block) const {
  return scores.view({call_.batch() * call_.k_heads(), group_ * block.rows(), block.keys});
}

Tensor Blocks::row_shift(const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out) const {
  Tensor shift = (grad_out.to(dtype_) * out).sum(-1).transpose(1, 2);
  return grad_lse.defined() ? shift - grad_lse : shift;
}

Tensor Blocks::product(const Tensor& rows, const Tensor& keys, const Block& block) const {
  return as_scores(at::bmm(rows, keys.transpose(1, 2)), block);
}

Tensor Blocks::beside_scores(const Tensor& slopes) {
  return (slopes.dim() == 1 ? slopes.unsqueeze(0) : slopes).unsqueeze(-1).unsqueeze(-1);
}

Tensor Blocks::sums_by_slope(const Tensor& scores) const {
  const Tensor of_sequences = scores.sum({2, 3}, /*keepdim=*/false, at::kDouble);
  return call_.slopes.dim() == 1 ? of_sequences.sum(0) : of_sequences;
}

Logits Blocks::logits(const Tensor& q, const Block& block) const {
  Tensor of_block;
  if (slopes_.defined() || left_.has_value() || right_.has_value()) {
    of_block = differences(block);
  }
  const Tensor hidden_keys = hidden(block, of_block);
  Logits result;
  result.values = product(q, keys_of(k_, block), block);
  if (call_.nan_if_too_long.defined()) {
    result.values.mul_(call_.nan_if_too_long.view({-1, 1, 1, 1}) + call_.scale);
  } else {
    result.values.mul_(call_.scale);
  }
  if (call_.softcap.has_value()) {
    result.tanh = result.values.div_(*call_.softcap).tanh_();
    result.values = result.tanh * *call_.softcap;
    if (hidden_keys.defined()) {
      result.tanh.masked_fill_(hidden_keys, 0);  // NaN in hidden keys would reach gradients
    }
  }
  if (slopes_.defined()) {
    result.distances = of_block.abs().to(dtype_).unsqueeze(1);
    result.values.addcmul_(slopes_, result.distances, -1);
  }
  if (hidden_keys.defined()) {
    result.values.masked_fill_(hidden_keys, -kInfinity);
  }
  return result;
}

}  // namespace posenc::blockwise
