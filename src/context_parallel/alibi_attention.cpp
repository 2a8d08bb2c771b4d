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

/// Sums of the gradients of the keys and values of another rank, which follow them around the ring. After the last step
/// each rank has those of its own keys.
class TravellingSums {
 public:
  TravellingSums(const Shard& shard, const Tensor& k, at::ScalarType dtype)
      : shard_(shard),
        block_(shard.group, at::empty({2, k.size(0), k.size(1), k.size(2), k.size(3)}, k.options().dtype(dtype))) {}

  /// Waits for the transfer, which has overlapped with the computation of `dk` and `dv`, results of the part.
  void add(const Part& part, const Tensor& dk, const Tensor& dv) {
    part.for_each_key_half(dk, [this](int64_t half, const Tensor& rows) { add(0, half, rows); });
    part.for_each_key_half(dv, [this](int64_t half, const Tensor& rows) { add(1, half, rows); });
  }

  /// Sends the sums to the next rank.
  void depart() {
    for (const int64_t of : {0, 1}) {
      for (const int64_t half : {0, 1}) {
        if (is_new_[of][half]) {
          half_of(of, half).zero_();
          is_new_[of][half] = false;
        }
      }
    }
    block_.depart();
  }

  /// The sums of half `half` of the keys (`of` = 0) or values (1).
  Tensor half_of(int64_t of, int64_t half) { return shard_.half(block_.here().select(0, of), 1, half); }

 private:
  void add(int64_t of, int64_t half, const Tensor& rows) {
    const Tensor sum = half_of(of, half);
    is_new_[of][half] ? sum.copy_(rows) : sum.add_(rows);
    is_new_[of][half] = false;
  }

  const Shard& shard_;
  TravellingBlock block_;
  std::array<std::array<bool, 2>, 2> is_new_{{{true, true}, {true, true}}};  // nothing was added to the half yet
};

/// The backward pass of a rank. With output and log-sum-exp over all keys, the gradients are sums over parts of the
/// keys.
class RingBackward {
 public:
  RingBackward(const Shard& shard, const AttentionBackwardArguments& arguments, const AttentionGradMask& mask)
      : shard_(shard),
        a_(arguments),
        q_grad_(mask.wanted[0]),
        k_grad_(mask.wanted[1]),
        v_grad_(mask.wanted[2]),
        slopes_grad_(mask.wanted[3] && arguments.slopes.has_value()),
        dtype_of_sums_(arguments::alibi_slopes_dtype(arguments.q.scalar_type())) {
    if (slopes_grad_) {
      const std::array<int64_t, 4> sizes{4, shard.call.batch, shard.call.q_heads, shard.call.q_len};
      sums_of_slopes_ = at::zeros(sizes, a_.q.options().dtype(at::kDouble));
    }
  }

  AttentionGradients run() {
    // The last part of the keys of this rank is computed at the end, while the sums of their gradients come home.
    std::optional<Part> last;
    std::optional<TravellingSums> travelling;
    if (k_grad_ || v_grad_) {
      travelling.emplace(shard_, a_.k, dtype_of_sums_);
    }
    around(shard_, a_.k, a_.v, [&](int64_t step, const Tensor& k, const Tensor& v) {
      std::vector<Part> parts = visible_parts(shard_, shard_.source(step));
      if (step == 0) {
        last = parts.back();
        parts.pop_back();
      }
      for (const Part& part : parts) {
        const auto [dq, dk, dv, unused] = compute(part, k, v);
        add_queries(part, dq);
        if (step == 0) {
          add_keys(part, dk, dv);
        } else if (travelling.has_value()) {
          travelling->add(part, dk, dv);
        }
      }
      if (step > 0 && travelling.has_value()) {
        travelling->depart();
      }
    });
    const auto [dq, dk, dv, unused] = compute(last.value(), a_.k, a_.v);
    add_queries(*last, dq);
    add_keys(*last, dk, dv);
    if (travelling.has_value()) {
      for (const int64_t half : {0, 1}) {
        sums_of_k_[half].add(travelling->half_of(0, half));
        sums_of_v_[half].add(travelling->half_of(1, half));
      }
    }
    return {
        finished(q_grad_, sums_of_q_, a_.q), finished(k_grad_, sums_of_k_, a_.k), finished(v_grad_, sums_of_v_, a_.v),
        slopes_gradient()};
  }

 private:
  using Sums = std::array<GradientSum, 2>;  // of both halves

  /// The gradients of q, k and v of a part, undefined if none of them is wanted. Adds its terms of the gradient of the
  /// slopes.
  AttentionGradients compute(const Part& part, const Tensor& k_block, const Tensor& v_block) const {
    const Tensor grad_out = part.queries_of(a_.grad_out);
    const Tensor q = part.queries_of(a_.q);
    const Tensor k = part.keys_of(k_block);
    const Tensor v = part.keys_of(v_block);
    const Tensor lse = part.lse_of_call(a_.lse, a_.slopes).contiguous();
    const std::optional<Tensor> slopes = part.slopes_of(a_.slopes);
    AttentionGradients result;
    if (q_grad_ || k_grad_ || v_grad_) {
      std::optional<Tensor> grad_lse;
      if (a_.grad_lse.has_value()) {
        grad_lse = part.numbers_of(*a_.grad_lse);
      }
      result = dispatch::alibi_attention_backward(
          part.options(), {grad_out, grad_lse, q, k, v, slopes, part.queries_of(a_.out), lse}, /*slopes_grad=*/false);
    }
    if (slopes_grad_) {
      part.add_slope_sums(
          sums_of_slopes_, dispatch::alibi_attention_slope_sums(part.options(), {grad_out, q, k, v, slopes, lse}));
    }
    return result;
  }

  void add_queries(const Part& part, const Tensor& dq) {
    if (q_grad_) {
      part.for_each_query_half(dq, [this](int64_t half, const Tensor& rows) { sums_of_q_[half].add(rows); });
    }
  }

  void add_keys(const Part& part, const Tensor& dk, const Tensor& dv) {
    if (k_grad_ || v_grad_) {
      part.for_each_key_half(dk, [this](int64_t half, const Tensor& rows) { sums_of_k_[half].add(rows); });
      part.for_each_key_half(dv, [this](int64_t half, const Tensor& rows) { sums_of_v_[half].add(rows); });
    }
  }

  /// The gradient of `x`, undefined unless it is wanted.
  Tensor finished(bool wanted, const Sums& sums, const Tensor& x) const {
    if (!wanted) {
      return {};
    }
    Tensor result = at::empty_like(x);
    for (const int64_t half : {0, 1}) {
      sums[half].finish(shard_.half(result, 1, half));
    }
    return result;
  }

  Tensor slopes_gradient() const {
    return slopes_grad_
        ? blockwise::slopes_gradient(sums_of_slopes_, a_.grad_lse.value_or(Tensor()), *a_.slopes).to(dtype_of_sums_)
        : Tensor();
  }

  const Shard& shard_;
  const AttentionBackwardArguments& a_;
  bool q_grad_, k_grad_, v_grad_, slopes_grad_;
  at::ScalarType dtype_of_sums_;
  Tensor sums_of_slopes_;
  Sums sums_of_q_{GradientSum(a_.q.scalar_type()), GradientSum(a_.q.scalar_type())};
  Sums sums_of_k_ = sums_of_q_;
  Sums sums_of_v_ = sums_of_q_;
};

AttentionGradients ring_backward(
    const AttentionGradMask& mask,
    const AttentionBackwardArguments& arguments,
    const ContextParallelOptions& options) {
  constexpr const char* kOp = "posenc::context_parallel_alibi_attention_backward";
  const Group group = process_group(kOp, options.group_name);
  const Shard shard{
      arguments::check_context_parallel_attention_backward(kOp, arguments, options, group->getSize()), group};
  const auto wanted = [&mask](size_t i, const Tensor& x) { return mask.wanted[i] ? x : Tensor(); };
  if (shard.ranks() == 1) {
    const bool slopes_grad = mask.wanted[3] && arguments.slopes.has_value();
    const auto [dq, dk, dv, dslopes] = dispatch::alibi_attention_backward(shard.options(), arguments, slopes_grad);
    return {wanted(0, dq), wanted(1, dk), wanted(2, dv), dslopes};
  }
  if (shard.empty()) {
    const auto& [grad_out, grad_lse, q, k, v, slopes, out, lse] = arguments;
    const at::ScalarType dtype = arguments::alibi_slopes_dtype(q.scalar_type());
    return {
        wanted(0, at::zeros_like(q)), wanted(1, at::zeros_like(k)), wanted(2, at::zeros_like(v)),
        slopes.has_value() ? wanted(3, at::zeros_like(*slopes, dtype)) : Tensor()};
  }
  return RingBackward(shard, arguments, mask).run();
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  m.impl("context_parallel_alibi_attention", kernel<ring_forward>);
  m.impl("context_parallel_alibi_attention_backward", kernel<ring_backward>);
}

}  // namespace posenc::context_parallel
