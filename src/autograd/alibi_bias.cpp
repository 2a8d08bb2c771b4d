#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <ops/alibi_bias.h>
#include <ops/dispatch.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

/// Saves which keys a query sees, and no tensor.
template <typename Derived>
class AlibiNode : public autograd::Node<Derived> {
 public:
  AlibiNode() = default;
  AlibiNode(bool causal, std::optional<c10::SymInt> query_offset)
      : causal_(causal), query_offset_(std::move(query_offset)) {}

  auto state() { return std::tie(causal_, query_offset_); }

 protected:
  bool causal_ = false;
  std::optional<c10::SymInt> query_offset_;
};

/// The bias is linear in the slopes, and its distances depend on its shape only.
class AlibiBiasBackward final : public AlibiNode<AlibiBiasBackward> {
 public:
  using AlibiNode::AlibiNode;

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if (grads[0].defined() && wants(0)) {
      result[0] = dispatch::alibi_slopes_backward({grads[0], causal_, query_offset_});
    }
    return result;
  }
};

Tensor alibi_bias_autograd(const AlibiBiasArguments<c10::SymInt>& a) {
  return autograd::forward_and_record<AlibiBiasBackward>(
      "posenc::alibi_bias", {a.slopes}, [&] { return dispatch::alibi_bias(a); }, a.causal, a.query_offset);
}

/// The gradient of the scores is the gradient of the sum. The gradient of the slopes is computed from it and from the
/// distances.
class AlibiAddBackward final : public AlibiNode<AlibiAddBackward> {
 public:
  using AlibiNode::AlibiNode;

  variable_list differentiate(const variable_list& grads) {
    const Tensor& grad = grads[0];
    variable_list result(2);
    if (!grad.defined()) {
      return result;
    }
    if (wants(0)) {
      result[0] = causal_ ? dispatch::alibi_mask({grad, query_offset_}) : grad;
    }
    if (wants(1)) {
      result[1] = dispatch::alibi_slopes_backward({grad, causal_, query_offset_});
    }
    return result;
  }
};

/// `alibi_mask` multiplies by zeros and ones, so its gradient is `alibi_mask` of the gradient.
class AlibiMaskBackward final : public AlibiNode<AlibiMaskBackward> {
 public:
  using AlibiNode::AlibiNode;

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if (grads[0].defined() && wants(0)) {
      result[0] = dispatch::alibi_mask({grads[0], query_offset_});
    }
    return result;
  }
};

Tensor alibi_add_autograd(const AlibiAddArguments<c10::SymInt>& a) {
  return autograd::forward_and_record<AlibiAddBackward>(
      "posenc::alibi_add", {a.scores, a.slopes}, [&] { return dispatch::alibi_add(a); }, a.causal, a.query_offset);
}

void alibi_add_autograd_(const AlibiAddArguments<c10::SymInt>& a) {
  const autograd::Differentiable differentiable{a.scores, a.slopes};
  autograd::check_no_tangents("posenc::alibi_add_", differentiable);
  NodePtr node;
  if (autograd::any_requires_grad(differentiable)) {
    autograd::check_overwritable("posenc::alibi_add_", "scores", a.scores, "use alibi_add");
    node = autograd::make_node<AlibiAddBackward>(differentiable, a.causal, a.query_offset);
  }
  {
    const at::AutoDispatchBelowAutograd below_autograd;  // to the kernel below, which counts versions
    dispatch::alibi_add_(a);
  }
  if (node != nullptr) {
    torch::autograd::rebase_history(a.scores, node);
  }
}

void alibi_add_version_(const AlibiAddArguments<c10::SymInt>& a) {
  autograd::count_versions([&] { dispatch::alibi_add_(a); }, a.scores);
}

Tensor alibi_mask_autograd(const AlibiMaskArguments<c10::SymInt>& a) {
  return autograd::forward_and_record<AlibiMaskBackward>(
      "posenc::alibi_mask", {a.grad}, [&] { return dispatch::alibi_mask(a); }, /*causal=*/true, a.query_offset);
}

/// `alibi_slopes_backward` is linear in `grad`, [B, H, Sq, Sk] or [H, Sq, Sk]. Its gradient is `alibi_bias` with the
/// incoming gradient, [H], as slopes; zero where the causal mask hides a key.
class AlibiSlopesBackwardBackward final : public AlibiNode<AlibiSlopesBackwardBackward> {
 public:
  AlibiSlopesBackwardBackward() = default;
  AlibiSlopesBackwardBackward(const Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset)
      : AlibiNode(causal, std::move(query_offset)), sizes_(grad.sym_sizes().vec()), dtype_(grad.scalar_type()) {}

  auto state() { return std::tuple_cat(std::tie(sizes_, dtype_), AlibiNode::state()); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if (grads[0].defined() && wants(0)) {
      const c10::SymInt& q_len = sizes_[sizes_.size() - 2];
      const c10::SymInt& k_len = sizes_.back();
      Tensor bias = dispatch::alibi_bias({grads[0], q_len, k_len, /*causal=*/false, dtype_, query_offset_});
      if (causal_) {
        bias = dispatch::alibi_mask({bias, query_offset_});
      }
      result[0] = bias.expand_symint(sizes_);
    }
    return result;
  }

 private:
  std::vector<c10::SymInt> sizes_;
  at::ScalarType dtype_ = at::kFloat;
};

Tensor alibi_slopes_backward_autograd(const AlibiSlopesBackwardArguments<c10::SymInt>& a) {
  return autograd::forward_and_record<AlibiSlopesBackwardBackward>(
      "posenc::alibi_slopes_backward", {a.grad}, [&] { return dispatch::alibi_slopes_backward(a); }, a.grad, a.causal,
      a.query_offset);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("alibi_bias", kernel<alibi_bias_autograd>);
  m.impl("alibi_add", kernel<alibi_add_autograd>);
  m.impl("alibi_add_", kernel<alibi_add_autograd_>);
  m.impl("alibi_mask", kernel<alibi_mask_autograd>);
  m.impl("alibi_slopes_backward", kernel<alibi_slopes_backward_autograd>);
}

TORCH_LIBRARY_IMPL(posenc, ADInplaceOrView, m) {
  m.impl("alibi_add_", kernel<alibi_add_version_>);
}

}  // namespace posenc
