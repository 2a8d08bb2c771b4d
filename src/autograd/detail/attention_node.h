#pragma once

#include <autograd/detail/record.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <tuple>

// How attention enters the graph, on one device or over a group of them.
namespace posenc::autograd {

/// q, k, v and slopes.
using AttentionInputs = std::array<at::Tensor, 4>;

/// What its backward pass has saved, and what every such pass begins with.
class AttentionNode : public torch::autograd::Node {
 public:
  explicit AttentionNode(const AttentionInputs& inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs_[i] = torch::autograd::SavedVariable(inputs[i], /*is_output=*/false);
    }
  }

  /// After the node has become the history of both.
  void save(const at::Tensor& out, const at::Tensor& lse) {
    out_ = torch::autograd::SavedVariable(out, /*is_output=*/true);
    lse_ = torch::autograd::SavedVariable(lse, /*is_output=*/true);
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) final {
    const std::lock_guard<std::mutex> lock(mutex_);
    // backward() may be called within an autocast region: gradients keep the dtypes of the forward pass.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (!grads[0].defined() && !grads[1].defined()) {
      return torch::autograd::variable_list(std::tuple_size_v<AttentionInputs>);
    }
    return differentiate({inputs_[0].unpack(), inputs_[1].unpack(), inputs_[2].unpack(), inputs_[3].unpack()}, grads);
  }

  void release_variables() final {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (torch::autograd::SavedVariable& input : inputs_) {
      input.reset_data();
    }
    out_.reset_data();
    lse_.reset_data();
  }

 protected:
  /// The gradients of the inputs from those of output and log-sum-exp, of which one may be undefined.
  virtual torch::autograd::variable_list differentiate(
      const AttentionInputs& inputs,
      const torch::autograd::variable_list& grads) = 0;

  at::Tensor out() { return out_.unpack(getptr()); }
  at::Tensor lse() { return lse_.unpack(getptr()); }

  /// `grad`, or zeros for those of `result`.
  static at::Tensor or_zeros(const at::Tensor& grad, const at::Tensor& result) {
    return grad.defined() ? grad : at::zeros_like(result);
  }

 private:
  std::array<torch::autograd::SavedVariable, std::tuple_size_v<AttentionInputs>> inputs_;
  torch::autograd::SavedVariable out_, lse_;
};

/// Output and log-sum-exp as `forward` computes them below autograd, with an `AttentionNode` as their history where one is
/// wanted. `args` go to its constructor after the inputs.
template <typename Node, typename Forward, typename... Args>
std::tuple<at::Tensor, at::Tensor> record_attention(
    const char* op,
    const AttentionInputs& inputs,
    const Forward& forward,
    const Args&... args) {
  for (const at::Tensor& input : inputs) {
    check_no_tangent(op, input);
  }
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward();
  }();
  if (any_requires_grad(inputs)) {
    const auto node = make_node<Node>(inputs, inputs, args...);
    torch::autograd::set_history(std::get<0>(outputs), node);
    torch::autograd::set_history(std::get<1>(outputs), node);
    static_cast<Node&>(*node).save(std::get<0>(outputs), std::get<1>(outputs));
  }
  return outputs;
}

}  // namespace posenc::autograd
