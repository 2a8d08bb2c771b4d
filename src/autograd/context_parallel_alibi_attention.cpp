#include <autograd/detail/attention_node.h>
#include <ops/context_parallel_alibi_attention.h>

#include <array>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
using autograd::AttentionInputs;
using torch::autograd::variable_list;

template <typename Group>
class ContextParallelAlibiAttentionBackward final : public autograd::AttentionNode {
 public:
  ContextParallelAlibiAttentionBackward(
      const AttentionInputs& inputs,
      Group group,
      const ContextParallelALiBiAttentionOptions& options)
      : AttentionNode(inputs), group_(std::move(group)), options_(options) {}

  std::string name() const override { return "ContextParallelAlibiAttentionBackward"; }

 private:
  variable_list differentiate(const AttentionInputs& inputs, const variable_list& grads) override {
    const auto& [q, k, v, slopes] = inputs;
    const Tensor result = out();
    auto [grad_q, grad_k, grad_v, grad_slopes] = context_parallel_alibi_attention_backward(
        or_zeros(grads[0], result), autograd::optional_tensor(grads[1]), q, k, v, slopes, result, lse(), group_,
        options_,
        {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2),
         task_should_compute_output(3)});
    return {grad_q, grad_k, grad_v, grad_slopes};
  }

  Group group_;
  ContextParallelALiBiAttentionOptions options_;
};

template <typename Group>
struct Autograd {
  static std::tuple<Tensor, Tensor> forward(
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const Tensor& slopes,
      const Group& group,
      const ContextParallelALiBiAttentionOptions& options) {
    return autograd::record_attention<ContextParallelAlibiAttentionBackward<Group>>(
        "posenc::context_parallel_alibi_attention", {q, k, v, slopes},
        [&] { return context_parallel_alibi_attention_with_lse(q, k, v, slopes, group, options); }, group, options);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
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
    autograd::check_no_gradients(
        "posenc::context_parallel_alibi_attention_backward",
        std::array<Tensor, 8>{grad_out, grad_lse.value_or(Tensor()), q, k, v, slopes, out, lse},
        "gradients of context_parallel_alibi_attention cannot be differentiated again");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return context_parallel_alibi_attention_backward(
        grad_out, grad_lse, q, k, v, slopes, out, lse, group, options, grad_mask);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  implement_context_parallel_alibi_attention<Autograd>(m);
}

}  // namespace posenc
