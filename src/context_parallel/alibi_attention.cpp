#include <arguments/alibi.h>
#include <blockwise/slopes_gradient.h>
#include <context_parallel/parts.h>
#include <context_parallel/results.h>
#include <context_parallel/ring.h>
#include <ops/alibi_attention.h>
#include <ops/context_parallel_alibi_attention.h>
#include <ops/dispatch.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
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
      part.for_each_query_half(rows, [&, &sums = sums](int64_t half, const Tensor& rows_of_half) {
        halves[half].add(rows_of_half, part.lse_of_half(sums, slopes, half));
      });
    }
  });
  for (int64_t half = 0; half < 2; ++half) {
    halves[half].finish(shard.half(out, 1, half), shard.half(lse, -1, half));
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
    AttentionGradients result;
    if (q_grad || kv_grad) {
      std::optional<Tensor> grad_lse_rows;
      if (a.grad_lse.has_value()) {
        grad_lse_rows = part.numbers_of(*a.grad_lse);
      }
      result = dispatch::alibi_attention_backward(
          part.options(), {grad_rows, grad_lse_rows, q_rows, k_rows, v_rows, slopes, part.queries_of(a.out), lse_rows},
          /*slopes_grad=*/false);
    }
    if (slopes_grad) {
      part.add_slope_sums(
          sums_of_slopes,
          dispatch::alibi_attention_slope_sums(part.options(), {grad_rows, q_rows, k_rows, v_rows, slopes, lse_rows}));
    }
    return result;
  };
  const auto result_like = [](bool wanted, const Tensor& x) { return wanted ? at::empty_like(x) : Tensor(); };
  const Tensor grad_q = result_like(q_grad, a.q);
  const Tensor grad_k = result_like(k_grad, a.k);
  const Tensor grad_v = result_like(v_grad, a.v);
  if (!shard.empty()) {
    using Sums = std::array<GradientSum, 2>;  // of both halves
    const GradientSum none(a.q.scalar_type());
    Sums sums_of_q{none, none};
    Sums sums_of_k{none, none};
    Sums sums_of_v{none, none};
    const auto add_to = [](Sums& sums) { return [&sums](int64_t half, const Tensor& rows) { sums[half].add(rows); }; };
    // Those of keys of other ranks. They follow their keys and are at home after the last step.
    TravellingBlock travelling(
        shard.group, kv_grad ? at::empty({2, a.k.size(0), a.k.size(1), a.k.size(2), a.k.size(3)}, wide) : Tensor());
    std::array<bool, 2> is_empty{true, true};  // of halves, before anything was added to them
    const auto add_to_travelling = [&](const Tensor& sums, const Part& part, const Tensor& dk, const Tensor& dv) {
      part.for_each_key_half(dk, [&](int64_t half, const Tensor& rows) {
        const Tensor sum = shard.half(sums.select(0, 0), 1, half);
        is_empty[half] ? sum.copy_(rows) : sum.add_(rows);
      });
      part.for_each_key_half(dv, [&](int64_t half, const Tensor& rows) {
        const Tensor sum = shard.half(sums.select(0, 1), 1, half);
        is_empty[half] ? sum.copy_(rows) : sum.add_(rows);
        is_empty[half] = false;
      });
    };
    // The last part of the keys of this rank is computed at the end, while those sums come home.
    std::optional<Part> last;
    around(shard, a.k, a.v, [&](int64_t step, const Tensor& k_block, const Tensor& v_block) {
      std::vector<Part> parts = visible_parts(shard, shard.source(step));
      if (step == 0) {
        last = parts.back();
        parts.pop_back();
      }
      for (const Part& part : parts) {
        const auto [dq, dk, dv, unused] = compute(part, k_block, v_block);
        if (q_grad) {
          part.for_each_query_half(dq, add_to(sums_of_q));
        }
        if (kv_grad && step == 0) {
          part.for_each_key_half(dk, add_to(sums_of_k));
          part.for_each_key_half(dv, add_to(sums_of_v));
        } else if (kv_grad) {
          // The transfer of the sums has overlapped with the computation of this part.
          add_to_travelling(travelling.here(), part, dk, dv);
        }
      }
      if (kv_grad && step > 0) {
        for (int64_t half = 0; half < 2; ++half) {
          if (is_empty[half]) {
            shard.half(travelling.here(), 2, half).zero_();
            is_empty[half] = false;
          }
        }
        travelling.depart();
      }
    });
    const auto [dq, dk, dv, unused] = compute(last.value(), a.k, a.v);
    if (q_grad) {
      last->for_each_query_half(dq, add_to(sums_of_q));
    }
    if (kv_grad) {
      last->for_each_key_half(dk, add_to(sums_of_k));
      last->for_each_key_half(dv, add_to(sums_of_v));
    }
    for (int64_t half = 0; half < 2; ++half) {
      const auto finish = [&shard, half](Sums& sums, const Tensor& result) {
        if (result.defined()) {
          sums[half].finish(shard.half(result, 1, half));
        }
      };
      if (kv_grad) {
        sums_of_k[half].add(shard.half(travelling.here().select(0, 0), 1, half));
        sums_of_v[half].add(shard.half(travelling.here().select(0, 1), 1, half));
      }
      finish(sums_of_q, grad_q);
      finish(sums_of_k, grad_k);
      finish(sums_of_v, grad_v);
    }
  }
  Tensor grad_slopes;
  if (slopes_grad) {
    grad_slopes = blockwise::slopes_gradient(sums_of_slopes, a.grad_lse.value_or(Tensor()), *a.slopes).to(wide.dtype());
  }
  return {grad_q, grad_k, grad_v, grad_slopes};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  m.impl("context_parallel_alibi_attention", kernel<ring_forward>);
  m.impl("context_parallel_alibi_attention_backward", kernel<ring_backward>);
}

}  // namespace posenc::context_parallel
