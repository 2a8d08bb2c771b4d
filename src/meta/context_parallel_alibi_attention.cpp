#include <meta/detail/attention_outputs.h>
#include <meta/detail/symbolic.h>
#include <ops/context_parallel_alibi_attention.h>
#include <ops/dispatch.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

/// The group is not looked up: while a graph is traced it may belong to another process.
constexpr int64_t kAtLeastOneRank = 1;

std::tuple<Tensor, Tensor> context_parallel_alibi_attention_meta(
    const ContextParallelOptions& options,
    const AttentionTensors& inputs) {
  if (!meta::any_symbol(inputs)) {
    arguments::check_context_parallel_attention(
        "posenc::context_parallel_alibi_attention", inputs, options, kAtLeastOneRank);
  }
  return {at::empty_like(inputs.q), meta::empty_lse(inputs.q)};
}

AttentionGradients context_parallel_alibi_attention_backward_meta(
    const AttentionGradMask& mask,
    const AttentionBackwardArguments& a,
    const ContextParallelOptions& options) {
  if (!meta::any_symbol(a)) {
    arguments::check_context_parallel_attention_backward(
        "posenc::context_parallel_alibi_attention_backward", a, options, kAtLeastOneRank);
  }
  const auto like = [](bool wanted, const Tensor& x) { return wanted ? at::empty_like(x) : Tensor(); };
  const auto& [q_grad, k_grad, v_grad, slopes_grad] = mask.wanted;
  return {
      like(q_grad, a.q), like(k_grad, a.k), like(v_grad, a.v),
      slopes_grad ? meta::empty_slopes_gradient(a.q, a.slopes) : Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("context_parallel_alibi_attention", kernel<context_parallel_alibi_attention_meta>);
  m.impl("context_parallel_alibi_attention_backward", kernel<context_parallel_alibi_attention_backward_meta>);
}

}  // namespace posenc
