#include <arguments/alibi.h>
#include <blockwise/slopes_gradient.h>
#include <context_parallel/merged_rows.h>
#include <context_parallel/parts.h>
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

#include <array>
#include <utility>
#include <vector>

namespace posenc::context_parallel {
namespace {

using at::Tensor;

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
    for (const Part& part : visible_parts(shard, shard.source(step))) {
      const auto [rows, sums] = dispatch::alibi_attention(
          part.options(), {part.queries_of(q), part.keys_of(k_block), part.keys_of(v_block), part.slopes_of(slopes)});
      part.for_each_half(rows, sums, slopes, [&](int64_t half, const Tensor& out_of_half, const Tensor& lse_of_half) {
        halves[half].add(out_of_half, lse_of_half);
      });
    }
  });
  for (int64_t half = 0; half < 2; ++half) {
    out.narrow(1, half * shard.half_len(), shard.half_len()).copy_(halves[half].out());
    lse.narrow(-1, half * shard.half_len(), shard.half_len()).copy_(halves[half].lse());
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
  // With output and log-sum-exp over all keys, the gradients are sums over parts of the keys.
  const auto compute = [&](const Part& part, const Tensor& k_block, const Tensor& v_block) {
    const Tensor grad_rows = part.queries_of(a.grad_out);
    const Tensor q_rows = part.queries_of(a.q);
    const Tensor k_rows = part.keys_of(k_block);
    const Tensor v_rows = part.keys_of(v_block);
    const Tensor lse_rows = part.lse_of_call(a.lse, a.slopes).contiguous();
    const std::optional<Tensor> slopes = part.slopes_of(a.slopes);
    if (q_grad || kv_grad) {
      std::optional<Tensor> grad_lse_rows;
      if (a.grad_lse.has_value()) {
        grad_lse_rows = part.numbers_of(*a.grad_lse);
      }
      const auto [dq, dk, dv, none] = dispatch::alibi_attention_backward(
          part.options(), {grad_rows, grad_lse_rows, q_rows, k_rows, v_rows, slopes, part.queries_of(a.out), lse_rows},
          /*slopes_grad=*/false);
      if (q_grad) {
        part.add_queries(sums_of_q, dq);
      }
      if (kv_grad) {
        // The transfer of the sums has overlapped with the computation of this part.
        const Tensor& sums = sums_of_kv.here();
        part.add_keys(sums.select(0, 0), dk);
        part.add_keys(sums.select(0, 1), dv);
      }
    }
    if (slopes_grad) {
      part.add_slope_sums(
          sums_of_slopes,
          dispatch::alibi_attention_slope_sums(part.options(), {grad_rows, q_rows, k_rows, v_rows, slopes, lse_rows}));
    }
  };
  if (!shard.empty()) {
    // The last part of the keys of this rank is computed at the end, while the sums of dk and dv come back.
    std::optional<Part> last;
    around(shard, a.k, a.v, [&](int64_t step, const Tensor& k_block, const Tensor& v_block) {
      std::vector<Part> parts = visible_parts(shard, shard.source(step));
      if (step == 0) {
        last = parts.back();
        parts.pop_back();
      }
      for (const Part& part : parts) {
        compute(part, k_block, v_block);
      }
      if (kv_grad) {
        sums_of_kv.depart();  // after the last step the sums are on the rank of their keys
      }
    });
    compute(*last, a.k, a.v);
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
