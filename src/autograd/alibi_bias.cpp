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

/// The bias is linear in the slopes, and its distances depend on its shape only: no tensor is saved.
class AlibiBiasBackward final : public autograd::Node<AlibiBiasBackward> {
 public:
  AlibiBiasBackward() = default;
  AlibiBiasBackward(bool causal, std::optional<c10::SymInt> query_offset)
      : causal_(causal), query_offset_(std::move(query_offset)) {}

  auto state() { return std::tie(causal_, query_offset_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if (grads[0].defined() && wants(0)) {
      result[0] = dispatch::alibi_slopes_backward({grads[0], causal_, query_offset_});
    }
    return result;
  }

  std::string name() const override { return "AlibiBiasBackward"; }

 private:
  bool causal_ = false;
  std::optional<c10::SymInt> query_offset_;
};

Tensor alibi_bias_autograd(const AlibiBiasArguments<c10::SymInt>& a) {
  const autograd::Differentiable differentiable{a.slopes};
  autograd::check_no_tangents("posenc::alibi_bias", differentiable);
  const Tensor output = autograd::below_autograd([&] { return dispatch::alibi_bias(a); });
  autograd::record<AlibiBiasBackward>(differentiable, {output}, a.causal, a.query_offset);
  return output;
}

/// The gradient of the scores is the gradient of the sum. The gradient of the slopes is computed from it and from the
/// distances. No tensor is saved.
class AlibiAddBackward final : public autograd::Node<AlibiAddBackward> {
 public:
  AlibiAddBackward() = default;
  AlibiAddBackward(bool causal, std::optional<c10::SymInt> query_offset)
      : causal_(causal), query_offset_(std::move(query_offset)) {}

  auto state() { return std::tie(causal_, query_offset_); }

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

  std::string name() const override { return "AlibiAddBackward"; }

 private:
  bool causal_ = false;
  std::optional<c10::SymInt> query_offset_;
};

/// `alibi_mask` multiplies by zeros and ones, so its gradient is `alibi_mask` of the gradient.
class AlibiMaskBackward final : public autograd::Node<AlibiMaskBackward> {
 public:
  AlibiMaskBackward() = default;
  explicit AlibiMaskBackward(std::optional<c10::SymInt> query_offset) : query_offset_(std::move(query_offset)) {}

  auto state() { return std::tie(query_offset_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if (grads[0].defined() && wants(0)) {
      result[0] = dispatch::alibi_mask({grads[0], query_offset_});
    }
    return result;
  }

  std::string name() const override { return "AlibiMaskBackward"; }

 private:
  std::optional<c10::SymInt> query_offset_;
};

Tensor alibi_add_autograd(const AlibiAddArguments<c10::SymInt>& a) {
  const autograd::Differentiable differentiable{a.scores, a.slopes};
  autograd::check_no_tangents("posenc::alibi_add", differentiable);
  const Tensor output = autograd::below_autograd([&] { return dispatch::alibi_add(a); });
  autograd::record<AlibiAddBackward>(differentiable, {output}, a.causal, a.query_offset);
  return output;
}

void alibi_add_autograd_(const AlibiAddArguments<c10::SymInt>& a) {
  const autograd::Differentiable differentiable{a.scores, a.slopes};
  autograd::check_no_tangents("posenc::alibi_add_", differentiable);
  NodePtr node;
  if (autograd::any_requires_grad(differentiable)) {
    TORCH_CHECK(
        !(a.scores.is_leaf() && a.scores.requires_grad()),
        "posenc::alibi_add_: expected scores that are no leaf of the graph, got a leaf that requires grad: its value "
        "cannot change in place; use alibi_add");
    torch::autograd::check_inplace(a.scores, /*requires_grad=*/true);  // refuses views that cannot be tracked
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

/// Increments the version of the scores, so that autograd refuses their values that were saved.
void alibi_add_version_(const AlibiAddArguments<c10::SymInt>& a) {
  autograd::below_autograd([&] { dispatch::alibi_add_(a); });
  torch::autograd::increment_version(a.scores);
}

Tensor alibi_mask_autograd(const AlibiMaskArguments<c10::SymInt>& a) {
  const autograd::Differentiable differentiable{a.grad};
  autograd::check_no_tangents("posenc::alibi_mask", differentiable);
  const Tensor output = autograd::below_autograd([&] { return dispatch::alibi_mask(a); });
  autograd::record<AlibiMaskBackward>(differentiable, {output}, a.query_offset);
  return output;
}

/// `alibi_slopes_backward` is linear in `grad`, [B, H, Sq, Sk] or [H, Sq, Sk]. Its gradient is `alibi_bias` with the
/// incoming gradient, [H], as slopes; zero where the causal mask hides a key.
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
      Tensor bias = dispatch::alibi_bias({grads[0], q_len, k_len, /*causal=*/false, dtype_, query_offset_});
      if (causal_) {
        bias = dispatch::alibi_mask({bias, query_offset_});
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

Tensor alibi_slopes_backward_autograd(const AlibiSlopesBackwardArguments<c10::SymInt>& a) {
  const autograd::Differentiable differentiable{a.grad};
  autograd::check_no_tangents("posenc::alibi_slopes_backward", differentiable);
  const Tensor output = autograd::below_autograd([&] { return dispatch::alibi_slopes_backward(a); });
  autograd::record<AlibiSlopesBackwardBackward>(differentiable, {output}, a.grad, a.causal, a.query_offset);
  return output;
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
