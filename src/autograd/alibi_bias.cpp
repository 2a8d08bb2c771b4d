#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <ops/alibi_bias.h>
#include <ops/alibi_slopes_backward.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <tuple>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

/// The bias is linear in the slopes, and its distances follow from its shape: nothing is saved.
class AlibiBiasBackward final : public autograd::Node<AlibiBiasBackward> {
 public:
  AlibiBiasBackward() = default;
  AlibiBiasBackward(bool causal, std::optional<c10::SymInt> query_offset)
      : causal_(causal), query_offset_(std::move(query_offset)) {}

  auto state() { return std::tie(causal_, query_offset_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if (grads[0].defined() && wants(0)) {
      result[0] = alibi_slopes_backward(grads[0], causal_, query_offset_);
    }
    return result;
  }

  std::string name() const override { return "AlibiBiasBackward"; }

 private:
  bool causal_ = false;
  std::optional<c10::SymInt> query_offset_;
};

Tensor alibi_bias_autograd(
    const Tensor& slopes,
    c10::SymInt q_len,
    c10::SymInt k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<c10::SymInt> query_offset) {
  autograd::check_no_tangent("posenc::alibi_bias", slopes);
  const Tensor output = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return alibi_bias_symint(slopes, std::move(q_len), std::move(k_len), causal, dtype, query_offset);
  }();
  const std::array<std::reference_wrapper<const Tensor>, 1> differentiable{slopes};
  if (autograd::any_requires_grad(differentiable)) {
    torch::autograd::set_history(
        output, autograd::make_node<AlibiBiasBackward>(differentiable, causal, std::move(query_offset)));
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("alibi_bias", alibi_bias_autograd);
}

}  // namespace posenc
