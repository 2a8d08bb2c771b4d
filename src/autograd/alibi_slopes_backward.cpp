#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <ops/alibi_add.h>
#include <ops/alibi_bias.h>
#include <ops/alibi_slopes_backward.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

/// The gradient of slopes is linear in the gradient of the bias. Its transpose is the bias itself, of what comes in
/// as slopes, and zero where the mask hides a key.
class AlibiSlopesBackwardBackward final : public autograd::Node<AlibiSlopesBackwardBackward> {
 public:
  AlibiSlopesBackwardBackward() = default;
  AlibiSlopesBackwardBackward(const Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset)
      : sizes_(grad.sym_sizes().vec()),
        dtype_(grad.scalar_type()),
        causal_(causal),
        query_offset_(std::move(query_offset)) {}

  auto state() { return std::tie(sizes_, dtype_, causal_, query_offset_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if (grads[0].defined() && wants(0)) {
      const c10::SymInt& q_len = sizes_[sizes_.size() - 2];
      const c10::SymInt& k_len = sizes_.back();
      Tensor bias = alibi_bias_symint(grads[0], q_len, k_len, /*causal=*/false, dtype_, query_offset_);
      if (causal_) {
        bias = alibi_mask(bias, query_offset_);
      }
      result[0] = bias.expand_symint(sizes_);
    }
    return result;
  }

  std::string name() const override { return "AlibiSlopesBackwardBackward"; }

 private:
  std::vector<c10::SymInt> sizes_;
  at::ScalarType dtype_ = at::kFloat;
  bool causal_ = false;
  std::optional<c10::SymInt> query_offset_;
};

Tensor alibi_slopes_backward_autograd(const Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset) {
  autograd::check_no_tangent("posenc::alibi_slopes_backward", grad);
  const Tensor output = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return alibi_slopes_backward(grad, causal, query_offset);
  }();
  const std::array<std::reference_wrapper<const Tensor>, 1> differentiable{grad};
  if (autograd::any_requires_grad(differentiable)) {
    torch::autograd::set_history(
        output,
        autograd::make_node<AlibiSlopesBackwardBackward>(differentiable, grad, causal, std::move(query_offset)));
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("alibi_slopes_backward", alibi_slopes_backward_autograd);
}

}  // namespace posenc
