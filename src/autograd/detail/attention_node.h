#pragma once

#include <autograd/detail/node.h>
#include <autograd/detail/record.h>

#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <tuple>

// Autograd of attention, on one device or over a process group.
namespace posenc::autograd {

/// q, k, v and slopes, which are undefined if there are none.
using AttentionInputs = std::array<at::Tensor, 4>;

/// Saves inputs and outputs of attention for its backward pass, which `Derived` computes:
///
///     variable_list gradients(const AttentionInputs& inputs, const variable_list& grads);
///
/// returns the gradients of the inputs from the gradients of output and log-sum-exp, one of which may be undefined.
template <typename Derived>
class AttentionNode : public Node<Derived> {
 public:
  using typename Node<Derived>::SavedVariable;
  using typename Node<Derived>::variable_list;

  AttentionNode() = default;
  explicit AttentionNode(const AttentionInputs& inputs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs_[i] = SavedVariable(inputs[i], /*is_output=*/false);
    }
  }

  /// To be called after the node has become the history of both outputs.
  void save(const at::Tensor& out, const at::Tensor& lse) {
    out_ = SavedVariable(out, /*is_output=*/true);
    lse_ = SavedVariable(lse, /*is_output=*/true);
  }

  auto attention_state() { return std::tie(inputs_, out_, lse_); }

  variable_list differentiate(const variable_list& grads) {
    // backward() may be called in an autocast region. Gradients keep the dtypes of the forward pass.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (!grads[0].defined() && !grads[1].defined()) {
      return variable_list(inputs_.size());
    }
    AttentionInputs inputs;
    for (size_t i = 0; i < inputs.size(); ++i) {
      inputs[i] = this->unpack(inputs_[i]);
    }
    return static_cast<Derived&>(*this).gradients(inputs, grads);
  }

 protected:
  at::Tensor out() { return this->unpack(out_); }
  at::Tensor lse() { return this->unpack(lse_); }

  /// `grad`, or zeros of the shape of `result` if it is undefined.
  static at::Tensor or_zeros(const at::Tensor& grad, const at::Tensor& result) {
    return grad.defined() ? grad : at::zeros_like(result);
  }

 private:
  std::array<SavedVariable, std::tuple_size_v<AttentionInputs>> inputs_;
  SavedVariable out_, lse_;
};

/// Calls `forward` below autograd and makes a new `Node`, derived from `AttentionNode`, the history of output and
/// log-sum-exp if a graph is recorded. `args` go to its constructor after the inputs.
template <typename Node, typename Forward, typename... Args>
std::tuple<at::Tensor, at::Tensor> record_attention(
    const char* op,
    const AttentionInputs& inputs,
    const Forward& forward,
    const Args&... args) {
  check_no_tangents(op, inputs);
  auto outputs = below_autograd(forward);
  const auto& [out, lse] = outputs;
  if (Node* node = record<Node>(inputs, {out, lse}, inputs, args...)) {
    node->save(out, lse);
  }
  return outputs;
}

}  // namespace posenc::autograd
