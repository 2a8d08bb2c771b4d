#include <autograd/detail/attention_node.h>
#include <ops/context_parallel_alibi_attention.h>

#include <array>
#include <string>
#include <type_traits>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
using autograd::AttentionInputs;
using torch::autograd::variable_list;

constexpr const char* kBackward = "posenc::context_parallel_alibi_attention_backward";

template <typename Group>
class ContextParallelAlibiAttentionBackward final
    : public autograd::AttentionNode<ContextParallelAlibiAttentionBackward<Group>> {
 public:
  ContextParallelAlibiAttentionBackward() = default;
  ContextParallelAlibiAttentionBackward(
      const AttentionInputs& inputs,
      Group group,
      const ContextParallelALiBiAttentionOptions& options)
      : autograd::AttentionNode<ContextParallelAlibiAttentionBackward<Group>>(inputs),
        group_(std::move(group)),
        scale_(options.scale()),
        causal_(options.causal()) {}

  std::string name() const override { return "ContextParallelAlibiAttentionBackward"; }

  /// A graph can hold the name of a group, but not the object.
  static constexpr bool kCompiledAutograd = std::is_same_v<Group, std::string>;

  auto state() {
    const auto options = std::tuple_cat(this->attention_state(), std::tie(scale_, causal_));
    if constexpr (kCompiledAutograd) {
      return std::tuple_cat(options, std::tie(group_));
    } else {
      return options;
    }
  }

  variable_list gradients(const AttentionInputs& inputs, const variable_list& grads) {
    const auto& [q, k, v, slopes] = inputs;
    const Tensor result = this->out();
    auto [grad_q, grad_k, grad_v, grad_slopes] = context_parallel_alibi_attention_backward(
        this->or_zeros(grads[0], result), autograd::optional_tensor(grads[1]), q, k, v, slopes, result, this->lse(),
        group_, ContextParallelALiBiAttentionOptions().scale(scale_).causal(causal_),
        {this->wants(0), this->wants(1), this->wants(2), this->wants(3)});
    return {grad_q, grad_k, grad_v, grad_slopes};
  }

 private:
  Group group_;
  std::optional<double> scale_;
  bool causal_ = false;
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
    const std::array<Tensor, 6> inputs{grad_out, grad_lse.value_or(Tensor()), q, k, v, slopes};
    for (const Tensor& input : inputs) {
      autograd::check_no_tangent(kBackward, input);
    }
    const auto result = autograd::below_autograd([&] {
      return context_parallel_alibi_attention_backward(
          grad_out, grad_lse, q, k, v, slopes, out, lse, group, options, grad_mask);
    });
    const auto& [grad_q, grad_k, grad_v, grad_slopes] = result;
    autograd::record_no_derivative(kBackward, inputs, {grad_q, grad_k, grad_v, grad_slopes});
    return result;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  implement_context_parallel_alibi_attention<Autograd>(m);
}

}  // namespace posenc
