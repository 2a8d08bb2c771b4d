#include <autograd/detail/record.h>
#include <ops/alibi_attention.h>
#include <posenc/reference.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// q, k, v and slopes.
using Inputs = std::array<Tensor, 4>;

class AlibiAttentionBackward : public torch::autograd::Node {
 public:
  AlibiAttentionBackward(const Inputs& inputs, const ALiBiAttentionOptions& options) : options_(options) {
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
    const Inputs inputs{inputs_[0].unpack(), inputs_[1].unpack(), inputs_[2].unpack(), inputs_[3].unpack()};
    if (at::GradMode::is_enabled()) {
      return differentiable(inputs, grads);
    }
    const auto& [q, k, v, slopes] = inputs;
    const Tensor out = out_.unpack(getptr());
    auto [grad_q, grad_k, grad_v, grad_slopes] = alibi_attention_backward(
        grads[0].defined() ? grads[0] : at::zeros_like(out), autograd::optional_tensor(grads[1]), q, k, v, slopes, out,
        lse_.unpack(getptr()), options_, /*slopes_grad=*/task_should_compute_output(3));
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

  std::string name() const override { return "AlibiAttentionBackward"; }

 private:
  /// Gradients that can be differentiated themselves: those of the reference version, with the scores in memory.
  variable_list differentiable(const Inputs& inputs, const variable_list& grads) {
    const auto [out, lse] = reference::alibi_attention(inputs[0], inputs[1], inputs[2], inputs[3], options_);
    variable_list wanted;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (task_should_compute_output(i)) {
        wanted.push_back(inputs[i]);
      }
    }
    const variable_list found = torch::autograd::grad(
        {out, lse}, wanted,
        {grads[0].defined() ? grads[0] : at::zeros_like(out), grads[1].defined() ? grads[1] : at::zeros_like(lse)},
        /*retain_graph=*/true, /*create_graph=*/true, /*allow_unused=*/true);
    variable_list result(inputs.size());
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (task_should_compute_output(i)) {
        result[i] = found[next++];
      }
    }
    return result;
  }

  ALiBiAttentionOptions options_;  // its tensors are integers: nothing of the graph
  std::array<SavedVariable, 4> inputs_;
  SavedVariable out_, lse_;
};

std::tuple<Tensor, Tensor> alibi_attention_autograd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  const Inputs inputs{q, k, v, slopes};
  for (const Tensor& input : inputs) {
    autograd::check_no_tangent("posenc::alibi_attention", input);
  }
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return alibi_attention_with_lse(q, k, v, slopes, options);
  }();
  if (autograd::any_requires_grad(inputs)) {
    const auto node = autograd::make_node<AlibiAttentionBackward>(inputs, inputs, options);
    torch::autograd::set_history(std::get<0>(outputs), node);
    torch::autograd::set_history(std::get<1>(outputs), node);
    static_cast<AlibiAttentionBackward&>(*node).save(std::get<0>(outputs), std::get<1>(outputs));
  }
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward_autograd(
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    const ALiBiAttentionOptions& options,
    bool slopes_grad) {
  const std::array<Tensor, 8> inputs{grad_out, grad_lse.value_or(Tensor()), q, k, v, slopes, out, lse};
  autograd::check_no_gradients(
      "posenc::alibi_attention_backward", inputs, "differentiate alibi_attention with create_graph");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return alibi_attention_backward(grad_out, grad_lse, q, k, v, slopes, out, lse, options, slopes_grad);
}

Tensor alibi_attention_slope_sums_autograd(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& lse,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset) {
  autograd::check_no_gradients(
      "posenc::alibi_attention_slope_sums", std::array<Tensor, 6>{grad_out, q, k, v, slopes, lse},
      "differentiate alibi_attention with create_graph");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return alibi_attention_slope_sums(grad_out, q, k, v, slopes, lse, scale, causal, query_offset);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("alibi_attention", alibi_attention_kernel<alibi_attention_autograd>);
  m.impl("alibi_attention_backward", alibi_attention_backward_kernel<alibi_attention_backward_autograd>);
  m.impl("alibi_attention_slope_sums", alibi_attention_slope_sums_autograd);
}

}  // namespace posenc
