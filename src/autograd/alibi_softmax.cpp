#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <ops/alibi_bias.h>
#include <ops/alibi_softmax.h>
#include <ops/dispatch.h>

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

/// Saves the probabilities only. The masks are not needed: hidden keys have probability zero.
class AlibiSoftmaxBackward final : public autograd::Node<AlibiSoftmaxBackward> {
 public:
  AlibiSoftmaxBackward() = default;
  explicit AlibiSoftmaxBackward(Settings settings) : settings_(std::move(settings)) {}

  void save_outputs(const Tensor& probs) { probs_ = SavedVariable(probs, /*is_output=*/true); }

  auto state() { return std::tie(settings_, probs_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(2);
    if (grads[0].defined() && wants(0, 2)) {
      const Tensor probs = unpack(probs_);
      std::tie(result[0], result[1]) = dispatch::alibi_softmax_backward(
          {grads[0], probs, settings_.scale, settings_.causal, settings_.query_offset, /*slopes_grad=*/wants(1)});
    }
    return result;
  }

 private:
  Settings settings_;
  SavedVariable probs_;
};

/// Let u and w be the incoming gradients of dscores and dslopes. Their inner product with dscores and dslopes is
///
///     F = sum of P (g - r) v,    r = sum over keys of g P,    v = scale u - w d,
///
/// whose derivatives are dF/dg = P (v - sum of P v) and dF/dP = (g - r) v - g (sum of P v). With fixed slopes P are the
/// saved probabilities p. With a gradient of slopes P = p / (sum of p) and
/// dF/dp = (dF/dP - sum of P dF/dP) / (sum of p). Computed in tensor operations, which can be differentiated again.
class AlibiSoftmaxBackwardBackward final : public autograd::Node<AlibiSoftmaxBackwardBackward> {
 public:
  AlibiSoftmaxBackwardBackward() = default;
  /// @param normalised  whether probabilities were divided by their sum, which they are for the gradient of slopes.
  AlibiSoftmaxBackwardBackward(const Tensor& grad, const Tensor& probs, Settings settings, bool normalised)
      : settings_(std::move(settings)),
        normalised_(normalised),
        grad_(grad, /*is_output=*/false),
        probs_(probs, /*is_output=*/false) {}

  auto state() { return std::tie(settings_, normalised_, grad_, probs_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(2);
    const Tensor& slopes_grad = grads[1];
    if (!grads[0].defined() && !slopes_grad.defined()) {
      return result;
    }
    const Tensor probs = unpack(probs_);
    const auto dtype = probs.scalar_type();
    const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
    Tensor p = probs.to(wide);
    Tensor total;
    if (normalised_) {
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
      const Tensor bias = dispatch::alibi_bias(
          {slopes_grad, p.sym_size(-2), p.sym_size(-1), /*causal=*/false, wide, settings_.query_offset});  // -w d
      v = v.defined() ? v + bias : bias;
    }
    const Tensor pv = (p * v).sum(-1, /*keepdim=*/true);
    if (wants(0)) {
      result[0] = (p * (v - pv)).to(dtype);
    }
    if (wants(1)) {
      const Tensor r = (g * p).sum(-1, /*keepdim=*/true);
      Tensor dp = (g - r) * v - g * pv;
      if (normalised_) {
        dp = (dp - (p * dp).sum(-1, /*keepdim=*/true)) / total;
      }
      result[1] = dp.to(dtype);
    }
    return result;
  }

 private:
  Settings settings_;
  bool normalised_ = false;
  SavedVariable grad_, probs_;
};

Tensor alibi_softmax_autograd(const AlibiSoftmaxArguments<c10::SymInt>& a) {
  return autograd::forward_and_record<AlibiSoftmaxBackward>(
      "posenc::alibi_softmax", {a.scores, a.slopes}, [&] { return dispatch::alibi_softmax(a); },
      Settings{a.scale, a.causal, a.query_offset});
}

std::tuple<Tensor, Tensor> alibi_softmax_backward_autograd(const AlibiSoftmaxBackwardArguments<c10::SymInt>& a) {
  return autograd::forward_and_record<AlibiSoftmaxBackwardBackward>(
      "posenc::alibi_softmax_backward", {a.grad, a.probs}, [&] { return dispatch::alibi_softmax_backward(a); }, a.grad,
      a.probs, Settings{a.scale, a.causal, a.query_offset}, /*normalised=*/a.slopes_grad);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("alibi_softmax", kernel<alibi_softmax_autograd>);
  m.impl("alibi_softmax_backward", kernel<alibi_softmax_backward_autograd>);
}

}  // namespace posenc
