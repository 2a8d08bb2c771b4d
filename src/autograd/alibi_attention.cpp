#include <autograd/detail/attention_node.h>
#include <ops/alibi_attention.h>
#include <posenc/reference.h>

#include <torch/library.h>

#include <array>

namespace posenc {
namespace {

using at::Tensor;
using autograd::AttentionInputs;
using torch::autograd::variable_list;

class AlibiAttentionBackward final : public autograd::AttentionNode {
 public:
  AlibiAttentionBackward(const AttentionInputs& inputs, const ALiBiAttentionOptions& options)
      : AttentionNode(inputs), options_(options) {}

  std::string name() const override { return "AlibiAttentionBackward"; }

 private:
  variable_list differentiate(const AttentionInputs& inputs, const variable_list& grads) override {
    if (at::GradMode::is_enabled()) {
      return differentiable(inputs, grads);
    }
    const auto& [q, k, v, slopes] = inputs;
    const Tensor result = out();
    auto [grad_q, grad_k, grad_v, grad_slopes] = alibi_attention_backward(
        or_zeros(grads[0], result), autograd::optional_tensor(grads[1]), q, k, v, slopes, result, lse(), options_,
        /*slopes_grad=*/task_should_compute_output(3));
    return {grad_q, grad_k, grad_v, grad_slopes};
  }

  /// Gradients that can be differentiated themselves: those of the reference version, with the scores in memory.
  variable_list differentiable(const AttentionInputs& inputs, const variable_list& grads) {
    const auto [out, lse] = reference::alibi_attention(inputs[0], inputs[1], inputs[2], inputs[3], options_);
    variable_list wanted;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (task_should_compute_output(i)) {
        wanted.push_back(inputs[i]);
      }
    }
    const variable_list found = torch::autograd::grad(
        {out, lse}, wanted, {or_zeros(grads[0], out), or_zeros(grads[1], lse)},
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
};

std::tuple<Tensor, Tensor> alibi_attention_autograd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  return autograd::record_attention<AlibiAttentionBackward>(
      "posenc::alibi_attention", {q, k, v, slopes}, [&] { return alibi_attention_with_lse(q, k, v, slopes, options); },
      options);
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
