#include <arguments/alibi.h>
#include <arguments/context_parallel_alibi_attention.h>
#include <blockwise/merge.h>
#include <context_parallel/alibi_attention.h>
#include <context_parallel/ring.h>
#include <ops/alibi_attention.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>
#include <vector>

namespace posenc::context_parallel {
namespace {

using at::Tensor;
using blockwise::MergedRows;
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

/// One rank's part of a call.
struct Shard {
  arguments::AlibiAttention call;
  Group group;

  int64_t ranks() const { return group->getSize(); }
  int64_t half_len() const { return call.q_len / 2; }
  SymbolicAttentionOptions options() const {
    SymbolicAttentionOptions result;
    result.scale = call.scale;
    result.causal = call.causal;
    return result;
  }
  bool empty() const { return call.batch * call.q_len * call.q_heads == 0; }

  /// Dimension of tokens in tensors like q, and in those like lse.
  Tensor half(const Tensor& x, int64_t half) const { return x.narrow(1, half * half_len(), half_len()); }
  Tensor half_of_rows(const Tensor& x, int64_t half) const { return x.narrow(-1, half * half_len(), half_len()); }

  /// The rank whose keys are here after `step` shifts.
  int64_t source(int64_t step) const { return (group->getRank() - step + ranks()) % ranks(); }
};

/// Half of the queries against half of the keys: between chunks, distances jump.
struct Pair {
  int64_t q_half, k_half;
  SymbolicAttentionOptions options;
  // Tokens to add to every distance: true distance minus the distance that the kernel computes. Chunks that are not
  // neighbours are computed as neighbours, and the scores of each row are then too large by slope * beyond. The fused
  // kernels are built for one offset: this way there are three of them, not one for each pair of ranks.
  int64_t beyond;
};

/// Those of the queries here and the keys of rank `source` that see each other.
std::vector<Pair> visible_pairs(const Shard& shard, int64_t source) {
  const auto chunk = [&](int64_t rank, int64_t half) { return half == 0 ? rank : 2 * shard.ranks() - 1 - rank; };
  std::vector<Pair> pairs;
  for (int64_t q_half = 0; q_half < 2; ++q_half) {
    for (int64_t k_half = 0; k_half < 2; ++k_half) {
      const int64_t ahead = chunk(shard.group->getRank(), q_half) - chunk(source, k_half);
      if (shard.call.causal && ahead < 0) {
        continue;
      }
      const int64_t as_computed = std::clamp<int64_t>(ahead, -1, 1);
      Pair pair{q_half, k_half, shard.options(), std::abs(ahead - as_computed) * shard.half_len()};
      // Of chunks before the queries' own, the mask hides nothing.
      pair.options.causal = shard.call.causal && ahead == 0;
      pair.options.query_offset = as_computed * shard.half_len();
      pairs.push_back(std::move(pair));
    }
  }
  return pairs;
}

/// Calls `body(step, k, v)` with the keys and values of one rank after the other, its own first; those of the next are
/// on their way meanwhile. There is more than one rank.
template <typename Body>
void around(const Shard& shard, const Tensor& k, const Tensor& v, const Body& body) {
  TravellingBlock block(shard.group, at::stack({k, v}));
  for (int64_t step = 0; step < shard.ranks(); ++step) {
    const Tensor here = block.here();
    if (step + 1 < shard.ranks()) {
      block.depart();
    }
    body(step, here.select(0, 0), here.select(0, 1));
  }
}

/// `[B, Hq, S]` of rows as the call of a pair has it, from that of the whole sequence.
Tensor lse_of_call(const Tensor& lse, const Tensor& slopes, const Pair& pair) {
  return pair.beyond == 0 ? lse : lse + slopes.to(lse.scalar_type()).unsqueeze(-1) * pair.beyond;
}

/// And back.
Tensor lse_of_whole(const Tensor& lse, const Tensor& slopes, const Pair& pair) {
  return pair.beyond == 0 ? lse : lse - slopes.to(lse.scalar_type()).unsqueeze(-1) * pair.beyond;
}

/// Adds what a pair contributes to `alibi_attention_slope_sums` of the whole sequence.
void add_slope_sums(const Tensor& total, const Tensor& of_call, const Pair& pair) {
  total.add_(of_call);
  if (pair.beyond != 0) {
    total.select(0, 1).add_(of_call.select(0, 0), pair.beyond);
    total.select(0, 3).add_(of_call.select(0, 2), pair.beyond);
  }
}

/// The gradient of the slopes from `alibi_attention_slope_sums` over all keys.
Tensor slopes_gradient(const Tensor& sums, const std::optional<Tensor>& grad_lse) {
  const Tensor p = sums.select(0, 0);
  const Tensor mean = (sums.select(0, 1) / p).masked_fill_(p == 0, 0);
  Tensor terms = sums.select(0, 3) - sums.select(0, 2) * mean;
  if (grad_lse.has_value()) {
    terms.add_(*grad_lse * mean);
  }
  return terms.sum(at::IntArrayRef({0, 2})).neg_();
}

}  // namespace

std::tuple<Tensor, Tensor> alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Group& group,
    const ContextParallelALiBiAttentionOptions& options) {
  const Shard shard{
      arguments::check_context_parallel_attention(
          "posenc::context_parallel_alibi_attention", {q, k, v, slopes}, options, group->getSize()),
      group};
  if (shard.ranks() == 1) {
    return dispatch::alibi_attention(shard.options(), {q, k, v, slopes});
  }
  const auto wide = q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type()));
  Tensor out = at::empty_like(q);
  Tensor lse = at::empty({shard.call.batch, shard.call.q_heads, shard.call.q_len}, wide);
  if (shard.empty()) {
    return {out, lse};
  }
  std::array<MergedRows, 2> halves;
  around(shard, k, v, [&](int64_t step, const Tensor& k_block, const Tensor& v_block) {
    for (const Pair& pair : visible_pairs(shard, shard.source(step))) {
      const auto [part, part_lse] = dispatch::alibi_attention(
          pair.options,
          {shard.half(q, pair.q_half), shard.half(k_block, pair.k_half), shard.half(v_block, pair.k_half), slopes});
      halves[pair.q_half].add(part, lse_of_whole(part_lse, slopes, pair));
    }
  });
  for (int64_t half = 0; half < 2; ++half) {
    shard.half(out, half).copy_(halves[half].out());
    shard.half_of_rows(lse, half).copy_(halves[half].lse());
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward(
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    const Group& group,
    const ContextParallelALiBiAttentionOptions& options,
    std::array<bool, 4> grad_mask) {
  const Shard shard{
      arguments::check_context_parallel_attention_backward(
          "posenc::context_parallel_alibi_attention_backward",
          {grad_out, grad_lse, q, k, v, slopes, out, lse, grad_mask[3]}, options, group->getSize()),
      group};
  const bool q_grad = grad_mask[0];
  const bool k_grad = grad_mask[1];
  const bool v_grad = grad_mask[2];
  const bool slopes_grad = grad_mask[3];
  if (shard.ranks() == 1) {
    const auto wanted = [](bool is_wanted, const Tensor& x) { return is_wanted ? x : Tensor(); };
    const auto [dq, dk, dv, dslopes] = dispatch::alibi_attention_backward(
        shard.options(), {grad_out, grad_lse, q, k, v, slopes, out, lse, slopes_grad});
    return {wanted(q_grad, dq), wanted(k_grad, dk), wanted(v_grad, dv), dslopes};
  }
  const bool kv_grad = k_grad || v_grad;
  const auto wide = q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type()));
  Tensor sums_of_q = q_grad ? at::zeros_like(q, wide) : Tensor();
  TravellingBlock sums_of_kv(
      shard.group, kv_grad ? at::zeros({2, k.size(0), k.size(1), k.size(2), k.size(3)}, wide) : Tensor());
  Tensor sums_of_slopes;
  if (slopes_grad) {
    sums_of_slopes =
        at::zeros({4, shard.call.batch, shard.call.q_heads, shard.call.q_len}, q.options().dtype(at::kDouble));
  }
  if (!shard.empty()) {
    around(shard, k, v, [&](int64_t step, const Tensor& k_block, const Tensor& v_block) {
      for (const Pair& pair : visible_pairs(shard, shard.source(step))) {
        const Tensor grad_part = shard.half(grad_out, pair.q_half);
        const Tensor q_part = shard.half(q, pair.q_half);
        const Tensor k_part = shard.half(k_block, pair.k_half);
        const Tensor v_part = shard.half(v_block, pair.k_half);
        const Tensor lse_part = lse_of_call(shard.half_of_rows(lse, pair.q_half), slopes, pair);
        if (q_grad || kv_grad) {
          // With output and log-sum-exp over all keys, a part of the keys gives its part of the gradients.
          const std::optional<Tensor> grad_lse_part =
              grad_lse.has_value() ? std::optional<Tensor>(shard.half_of_rows(*grad_lse, pair.q_half)) : std::nullopt;
          const auto [dq, dk, dv, none] = dispatch::alibi_attention_backward(
              pair.options,
              {grad_part, grad_lse_part, q_part, k_part, v_part, slopes, shard.half(out, pair.q_half), lse_part,
               /*slopes_grad=*/false});
          if (q_grad) {
            shard.half(sums_of_q, pair.q_half).add_(dq);
          }
          if (kv_grad) {
            // Has travelled while the first pair was computed.
            const Tensor& sums = sums_of_kv.here();
            shard.half(sums.select(0, 0), pair.k_half).add_(dk);
            shard.half(sums.select(0, 1), pair.k_half).add_(dv);
          }
        }
        if (slopes_grad) {
          add_slope_sums(
              shard.half_of_rows(sums_of_slopes, pair.q_half),
              dispatch::alibi_attention_slope_sums(pair.options, {grad_part, q_part, k_part, v_part, slopes, lse_part}),
              pair);
        }
      }
      if (kv_grad) {
        sums_of_kv.depart();  // the last departure takes it home
      }
    });
  }
  const auto like = [](const Tensor& x, const Tensor& sums) { return at::empty_like(x).copy_(sums); };
  Tensor grad_slopes;
  if (slopes_grad) {
    grad_slopes = slopes_gradient(sums_of_slopes, grad_lse).to(wide.dtype());
  }
  return {
      q_grad ? sums_of_q.to(q.scalar_type()) : Tensor(), k_grad ? like(k, sums_of_kv.here().select(0, 0)) : Tensor(),
      v_grad ? like(v, sums_of_kv.here().select(0, 1)) : Tensor(), grad_slopes};
}

}  // namespace posenc::context_parallel
