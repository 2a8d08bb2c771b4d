#include <arguments/alibi.h>
#include <blockwise/merge.h>
#include <blockwise/slopes_gradient.h>
#include <context_parallel/group.h>
#include <context_parallel/ring.h>
#include <ops/alibi_attention.h>
#include <ops/context_parallel_alibi_attention.h>
#include <ops/dispatch.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <utility>
#include <vector>

namespace posenc::context_parallel {
namespace {

using at::Tensor;
using blockwise::MergedRows;

/// The part of a call on one rank.
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

  /// Half 0 or 1 of the tokens of `x`, `[B, S / C, H, D]` or, for `half_of_rows`, `[.., S / C]`; views.
  Tensor half(const Tensor& x, int64_t half) const { return x.narrow(1, half * half_len(), half_len()); }
  Tensor half_of_rows(const Tensor& x, int64_t half) const { return x.narrow(-1, half * half_len(), half_len()); }

  /// The rank whose keys this rank holds after `step` shifts around the ring.
  int64_t source(int64_t step) const { return (group->getRank() - step + ranks()) % ranks(); }
};

/// One half of the queries against one half of the keys. A shard is two chunks that are not adjacent in the sequence,
/// so distances are contiguous only within such a pair.
struct Pair {
  int64_t q_half, k_half;
  SymbolicAttentionOptions options;
  // Tokens to add to every distance: true distance minus the distance that the kernel computes. Chunks that are not
  // adjacent are computed as if they were, so the scores of each row are too large by slope * beyond. A fused kernel is
  // built for one query offset, and this way there are three offsets, not one for each pair of ranks.
  int64_t beyond;
};

/// The pairs of the queries of this rank and the keys of rank `source` that the causal mask does not hide.
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
      // All keys of an earlier chunk are visible.
      pair.options.causal = shard.call.causal && ahead == 0;
      pair.options.query_offset = as_computed * shard.half_len();
      pairs.push_back(std::move(pair));
    }
  }
  return pairs;
}

/// Calls `body(step, k, v)` with the keys and values of each rank in turn, beginning with this rank. The transfer of
/// the next block overlaps with `body`. Needs more than one rank.
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

/// The log-sum-exp of rows, `[B, Hq, S]`, relative to the distances that the call of a pair computes, from `lse`
/// relative to the true distances.
Tensor lse_of_call(const Tensor& lse, const std::optional<Tensor>& slopes, const Pair& pair) {
  return pair.beyond == 0 || !slopes.has_value() ? lse
                                                 : lse + slopes->to(lse.scalar_type()).unsqueeze(-1) * pair.beyond;
}

/// The inverse of `lse_of_call`.
Tensor lse_of_whole(const Tensor& lse, const std::optional<Tensor>& slopes, const Pair& pair) {
  return pair.beyond == 0 || !slopes.has_value() ? lse
                                                 : lse - slopes->to(lse.scalar_type()).unsqueeze(-1) * pair.beyond;
}

/// Adds the sums of `alibi_attention_slope_sums` of one pair, `of_call`, to those over all keys, `total`.
void add_slope_sums(const Tensor& total, const Tensor& of_call, const Pair& pair) {
  total.add_(of_call);
  if (pair.beyond != 0) {
    total.select(0, 1).add_(of_call.select(0, 0), pair.beyond);
    total.select(0, 3).add_(of_call.select(0, 2), pair.beyond);
  }
}

/// @throws c10::Error  if no group is registered by that name.
Group process_group(const char* op, const std::string& name) {
  Group group = find_group(name);
  TORCH_CHECK(
      group.defined(), op, ": expected group_name to be the name of a registered process group, got \"", name, "\"");
  return group;
}

std::tuple<Tensor, Tensor> ring_forward(const ContextParallelOptions& options, const AttentionTensors& inputs) {
  constexpr const char* kOp = "posenc::context_parallel_alibi_attention";
  const Group group = process_group(kOp, options.group_name);
  const Shard shard{arguments::check_context_parallel_attention(kOp, inputs, options, group->getSize()), group};
  if (shard.ranks() == 1) {
    return dispatch::alibi_attention(shard.options(), inputs);
  }
  const Tensor& q = inputs.q;
  const std::optional<Tensor>& slopes = inputs.slopes;
  const auto wide = q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type()));
  Tensor out = at::empty_like(q);
  Tensor lse = at::empty({shard.call.batch, shard.call.q_heads, shard.call.q_len}, wide);
  if (shard.empty()) {
    return {out, lse};
  }
  std::array<MergedRows, 2> halves;
  around(shard, inputs.k, inputs.v, [&](int64_t step, const Tensor& k_block, const Tensor& v_block) {
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

AttentionGradients ring_backward(
    const AttentionGradMask& mask,
    const AttentionBackwardArguments& a,
    const ContextParallelOptions& options) {
  constexpr const char* kOp = "posenc::context_parallel_alibi_attention_backward";
  const Group group = process_group(kOp, options.group_name);
  const Shard shard{arguments::check_context_parallel_attention_backward(kOp, a, options, group->getSize()), group};
  const bool q_grad = mask.wanted[0];
  const bool k_grad = mask.wanted[1];
  const bool v_grad = mask.wanted[2];
  const bool slopes_grad = mask.wanted[3] && a.slopes.has_value();
  if (shard.ranks() == 1) {
    const auto wanted = [](bool is_wanted, const Tensor& x) { return is_wanted ? x : Tensor(); };
    const auto [dq, dk, dv, dslopes] = dispatch::alibi_attention_backward(shard.options(), a, slopes_grad);
    return {wanted(q_grad, dq), wanted(k_grad, dk), wanted(v_grad, dv), dslopes};
  }
  const bool kv_grad = k_grad || v_grad;
  const auto wide = a.q.options().dtype(arguments::alibi_slopes_dtype(a.q.scalar_type()));
  Tensor sums_of_q = q_grad ? at::zeros_like(a.q, wide) : Tensor();
  TravellingBlock sums_of_kv(
      shard.group, kv_grad ? at::zeros({2, a.k.size(0), a.k.size(1), a.k.size(2), a.k.size(3)}, wide) : Tensor());
  Tensor sums_of_slopes;
  if (slopes_grad) {
    sums_of_slopes =
        at::zeros({4, shard.call.batch, shard.call.q_heads, shard.call.q_len}, a.q.options().dtype(at::kDouble));
  }
  if (!shard.empty()) {
    around(shard, a.k, a.v, [&](int64_t step, const Tensor& k_block, const Tensor& v_block) {
      for (const Pair& pair : visible_pairs(shard, shard.source(step))) {
        const Tensor grad_part = shard.half(a.grad_out, pair.q_half);
        const Tensor q_part = shard.half(a.q, pair.q_half);
        const Tensor k_part = shard.half(k_block, pair.k_half);
        const Tensor v_part = shard.half(v_block, pair.k_half);
        const Tensor lse_part = lse_of_call(shard.half_of_rows(a.lse, pair.q_half), a.slopes, pair);
        if (q_grad || kv_grad) {
          // With output and log-sum-exp over all keys, the gradients are sums over parts of the keys.
          std::optional<Tensor> grad_lse_part;
          if (a.grad_lse.has_value()) {
            grad_lse_part = shard.half_of_rows(*a.grad_lse, pair.q_half);
          }
          const auto [dq, dk, dv, none] = dispatch::alibi_attention_backward(
              pair.options,
              {grad_part, grad_lse_part, q_part, k_part, v_part, a.slopes, shard.half(a.out, pair.q_half), lse_part},
              /*slopes_grad=*/false);
          if (q_grad) {
            shard.half(sums_of_q, pair.q_half).add_(dq);
          }
          if (kv_grad) {
            // The transfer of the sums has overlapped with the computation of the first pair.
            const Tensor& sums = sums_of_kv.here();
            shard.half(sums.select(0, 0), pair.k_half).add_(dk);
            shard.half(sums.select(0, 1), pair.k_half).add_(dv);
          }
        }
        if (slopes_grad) {
          add_slope_sums(
              shard.half_of_rows(sums_of_slopes, pair.q_half),
              dispatch::alibi_attention_slope_sums(
                  pair.options, {grad_part, q_part, k_part, v_part, a.slopes, lse_part}),
              pair);
        }
      }
      if (kv_grad) {
        sums_of_kv.depart();  // after the last step the sums are on the rank of their keys
      }
    });
  }
  const auto like = [](const Tensor& x, const Tensor& sums) { return at::empty_like(x).copy_(sums); };
  Tensor grad_slopes;
  if (slopes_grad) {
    grad_slopes = blockwise::slopes_gradient(sums_of_slopes, a.grad_lse.value_or(Tensor()), *a.slopes).to(wide.dtype());
  }
  return {
      q_grad ? sums_of_q.to(a.q.scalar_type()) : Tensor(),
      k_grad ? like(a.k, sums_of_kv.here().select(0, 0)) : Tensor(),
      v_grad ? like(a.v, sums_of_kv.here().select(0, 1)) : Tensor(), grad_slopes};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  m.impl("context_parallel_alibi_attention", kernel<ring_forward>);
  m.impl("context_parallel_alibi_attention_backward", kernel<ring_backward>);
}

}  // namespace posenc::context_parallel
