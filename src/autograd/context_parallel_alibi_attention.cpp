#include <autograd/detail/record.h>
#include <ops/context_parallel_alibi_attention.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// q, k, v and slopes.
using Inputs = std::array<Tensor, 4>;

template <typename Group>
class ContextParallelAlibiAttentionBackward : public torch::autograd::Node {
 public:
  ContextParallelAlibiAttentionBackward(
      const Inputs& inputs,
      Group group,
      const ContextParallelALiBiAttentionOptions& options)
      : group_(std::move(group)), options_(options) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs_[i] = SavedVariable(inputs[i], /*is_output=*/false);
    }
  }

  /// After the node has become the history of both.
  void save(const Tensor& out, const Tensor& lse) {
    out_ = SavedVariable(out, /*is_output=*/true);
    lse_ = SavedVariable(lse, /*is_output=*/true);
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    // backward() may be called within an autocast region: gradients keep the dtypes of the forward pass.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (!grads[0].defined() && !grads[1].defined()) {
      return variable_list(4);
    }
    const Tensor out = out_.unpack(getptr());
    auto [grad_q, grad_k, grad_v, grad_slopes] = context_parallel_alibi_attention_backward(
        grads[0].defined() ? grads[0] : at::zeros_like(out), autograd::optional_tensor(grads[1]), inputs_[0].unpack(),
        inputs_[1].unpack(), inputs_[2].unpack(), inputs_[3].unpack(), out, lse_.unpack(getptr()), group_, options_,
        {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2),
         task_should_compute_output(3)});
    return {grad_q, grad_k, grad_v, grad_slopes};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& input : inputs_) {
      input.reset_data();
    }
    out_.reset_data();
    lse_.reset_data();
  }

  std::string name() const override { return "ContextParallelAlibiAttentionBackward"; }

 private:
  Group group_;
  ContextParallelALiBiAttentionOptions options_;
  std::array<SavedVariable, 4> inputs_;
  SavedVariable out_, lse_;
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
    const Inputs inputs{q, k, v, slopes};
    for (const Tensor& input : inputs) {
      autograd::check_no_tangent("posenc::context_parallel_alibi_attention", input);
    }
    auto outputs = [&] {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return context_parallel_alibi_attention_with_lse(q, k, v, slopes, group, options);
    }();
    if (autograd::any_requires_grad(inputs)) {
      using Node = ContextParallelAlibiAttentionBackward<Group>;
      const auto node = autograd::make_node<Node>(inputs, inputs, group, options);
      torch::autograd::set_history(std::get<0>(outputs), node);
      torch::autograd::set_history(std::get<1>(outputs), node);
      static_cast<Node&>(*node).save(std::get<0>(outputs), std::get<1>(outputs));
    }
    return outputs;
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
