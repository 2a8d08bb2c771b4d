#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <ops/alibi_bias.h>
#include <ops/alibi_softmax.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct Settings {
  double scale = 1;
  bool causal = false;
  std::optional<c10::SymInt> query_offset;

  auto state() { return std::tie(scale, causal, query_offset); }
};

/// Saves the probabilities alone: what the masks hid has probability zero.
class AlibiSoftmaxBackward final : public autograd::Node<AlibiSoftmaxBackward> {
 public:
  AlibiSoftmaxBackward() = default;
  explicit AlibiSoftmaxBackward(Settings settings) : settings_(std::move(settings)) {}

  /// After the node has become the history of `probs`.
  void save(const Tensor& probs) { probs_ = SavedVariable(probs, /*is_output=*/true); }

  auto state() { return std::tuple_cat(settings_.state(), std::tie(probs_)); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(2);
    if (grads[0].defined() && wants(0, 2)) {
      std::tie(result[0], result[1]) = alibi_softmax_backward(
          grads[0], unpack(probs_), settings_.scale, settings_.causal, settings_.query_offset,
          /*slopes_grad=*/wants(1));
    }
    return result;
  }

  std::string name() const override { return "AlibiSoftmaxBackward"; }

 private:
  Settings settings_;
  SavedVariable probs_;
};

/// With what arrives for `(dscores, dslopes)`, u and w, the inner product of both with the results is
///
///     F = sum of P (g - r) v,    r = sum over keys of g P,    v = scale u - w d,
///
/// whose derivatives are dF/dg = P (v - sum of P v) and dF/dP = (g - r) v - g (sum of P v). With fixed slopes P are the
/// saved probabilities p. With a gradient of slopes P = p / (sum of p), and dF/dp is dF/dP less the sum of P dF/dP,
/// divided by the sum of p. In tensor operations, so that they can be differentiated further.
class AlibiSoftmaxBackwardBackward final : public autograd::Node<AlibiSoftmaxBackwardBackward> {
 public:
  AlibiSoftmaxBackwardBackward() = default;
  AlibiSoftmaxBackwardBackward(const Tensor& grad, const Tensor& probs, Settings settings)
      : settings_(std::move(settings)), grad_(grad, /*is_output=*/false), probs_(probs, /*is_output=*/false) {}

  auto state() { return std::tuple_cat(settings_.state(), std::tie(grad_, probs_)); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(2);
    // With fixed slopes there is one output only, and probabilities are not divided by their sum.
    const bool normalised = grads.size() > 1;
    const Tensor slopes_grad = normalised ? grads[1] : Tensor();
    if (!grads[0].defined() && !slopes_grad.defined()) {
      return result;
    }
    const Tensor probs = unpack(probs_);
    const auto dtype = probs.scalar_type();
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    Tensor p = probs.to(wide);
    Tensor total;
    if (normalised) {
      const Tensor sum = p.sum(-1, /*keepdim=*/true);
      total = sum.masked_fill(sum == 0, 1);  // of rows that see no key
      p = p / total;
    }
    const Tensor g = unpack(grad_).to(wide);
    Tensor v;
    if (grads[0].defined()) {
      v = grads[0].to(wide) * settings_.scale;
    }
    if (slopes_grad.defined()) {
      const Tensor bias = alibi_bias_symint(
          slopes_grad, p.sym_size(-2), p.sym_size(-1), /*causal=*/false, wide, settings_.query_offset);  // -w d
      v = v.defined() ? v + bias : bias;
    }
    const Tensor pv = (p * v).sum(-1, /*keepdim=*/true);
    if (wants(0)) {
      result[0] = (p * (v - pv)).to(dtype);
    }
    if (wants(1)) {
      const Tensor r = (g * p).sum(-1, /*keepdim=*/true);
      Tensor dp = (g - r) * v - g * pv;
      if (normalised) {
        dp = (dp - (p * dp).sum(-1, /*keepdim=*/true)) / total;
      }
      result[1] = dp.to(dtype);
    }
    return result;
  }

  std::string name() const override { return "AlibiSoftmaxBackwardBackward"; }

 private:
  Settings settings_;
  SavedVariable grad_, probs_;
};

Tensor alibi_softmax_autograd(
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<c10::SymInt> query_offset) {
  const autograd::Differentiable differentiable{scores, slopes};
  autograd::check_no_tangents("posenc::alibi_softmax", differentiable);
  const Tensor output = autograd::below_autograd(
      [&] { return alibi_softmax_symint(scores, slopes, scale, causal, key_padding_mask, query_offset); });
  if (autograd::any_requires_grad(differentiable)) {
    const auto node =
        autograd::make_node<AlibiSoftmaxBackward>(differentiable, Settings{scale, causal, std::move(query_offset)});
    torch::autograd::set_history(output, node);
    static_cast<AlibiSoftmaxBackward&>(*node).save(output);
  }
  return output;
}

std::tuple<Tensor, Tensor> alibi_softmax_backward_autograd(
    const Tensor& grad,
    const Tensor& probs,
    double scale,
    bool causal,
    std::optional<c10::SymInt> query_offset,
    bool slopes_grad) {
  const autograd::Differentiable differentiable{grad, probs};
  autograd::check_no_tangents("posenc::alibi_softmax_backward", differentiable);
  auto outputs = autograd::below_autograd(
      [&] { return alibi_softmax_backward(grad, probs, scale, causal, query_offset, slopes_grad); });
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<AlibiSoftmaxBackwardBackward>(
        differentiable, grad, probs, Settings{scale, causal, std::move(query_offset)});
    torch::autograd::set_history(std::get<0>(outputs), node);
    if (slopes_grad) {
      torch::autograd::set_history(std::get<1>(outputs), node);
    }
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("alibi_softmax", alibi_softmax_autograd);
  m.impl("alibi_softmax_backward", alibi_softmax_backward_autograd);
}

}  // namespace posenc
