#include <autograd/detail/attention_node.h>
#include <ops/context_parallel_alibi_attention.h>
#include <ops/dispatch.h>
#ifdef USE_DISTRIBUTED
#include <context_parallel/group.h>
#endif

#include <torch/library.h>

#include <array>
#include <string>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
using autograd::AttentionInputs;
using torch::autograd::variable_list;

class ContextParallelAlibiAttentionBackward final
    : public autograd::AttentionNode<ContextParallelAlibiAttentionBackward> {
 public:
  ContextParallelAlibiAttentionBackward() = default;
  ContextParallelAlibiAttentionBackward(const AttentionInputs& inputs, ContextParallelOptions options)
      : AttentionNode(inputs), options_(std::move(options)) {
#ifdef USE_DISTRIBUTED
    group_ = context_parallel::find_group(options_.group_name);
#endif
  }

  std::string name() const override { return "ContextParallelAlibiAttentionBackward"; }

  auto state() {
    return std::tuple_cat(attention_state(), std::tie(options_.group_name, options_.scale, options_.causal));
  }

  variable_list gradients(const AttentionInputs& inputs, const variable_list& grads) {
    const auto& [q, k, v, slopes] = inputs;
    const Tensor result = out();
    auto [grad_q, grad_k, grad_v, grad_slopes] = dispatch::context_parallel_alibi_attention_backward(
        {{wants(0), wants(1), wants(2), wants(3)}},
        {or_zeros(grads[0], result), autograd::optional_tensor(grads[1]), q, k, v, autograd::optional_tensor(slopes),
         result, lse()},
        options_);
    return {grad_q, grad_k, grad_v, grad_slopes};
  }

 private:
  ContextParallelOptions options_;
  // Keeps the group alive until the backward pass: the registry of names does not. Null while a graph is traced for
  // another process.
  c10::intrusive_ptr<c10::intrusive_ptr_target> group_;
};

std::tuple<Tensor, Tensor> context_parallel_alibi_attention_autograd(
    const ContextParallelOptions& options,
    const AttentionTensors& inputs) {
  return autograd::record_attention<ContextParallelAlibiAttentionBackward>(
      "posenc::context_parallel_alibi_attention", {inputs.q, inputs.k, inputs.v, autograd::or_undefined(inputs.slopes)},
      [&] { return dispatch::context_parallel_alibi_attention(options, inputs); }, options);
}

AttentionGradients context_parallel_alibi_attention_backward_autograd(
    const AttentionGradMask& mask,
    const AttentionBackwardArguments& a,
    const ContextParallelOptions& options) {
  constexpr const char* kOp = "posenc::context_parallel_alibi_attention_backward";
  using autograd::or_undefined;
  const std::array<Tensor, 6> inputs{a.grad_out, or_undefined(a.grad_lse), a.q, a.k, a.v, or_undefined(a.slopes)};
  autograd::check_no_tangents(kOp, inputs);
  auto result =
      autograd::below_autograd([&] { return dispatch::context_parallel_alibi_attention_backward(mask, a, options); });
  const auto& [grad_q, grad_k, grad_v, grad_slopes] = result;
  autograd::record_no_derivative(kOp, inputs, {grad_q, grad_k, grad_v, grad_slopes});
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("context_parallel_alibi_attention", kernel<context_parallel_alibi_attention_autograd>);
  m.impl("context_parallel_alibi_attention_backward", kernel<context_parallel_alibi_attention_backward_autograd>);
}

}  // namespace posenc
