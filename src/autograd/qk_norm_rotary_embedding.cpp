#include <arguments/qk_norm_rotary_embedding.h>
#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <autograd/detail/saved_rotation.h>
#include <meta/detail/symbolic.h>
#include <ops/dispatch.h>
#include <ops/qk_norm_rotary_embedding.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using autograd::Differentiable;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The normalised input and its factors in the arithmetic dtype, in tensor operations, for derivatives that the kernels
/// do not compute.
struct Normalised {
  Tensor rstd, x_hat, weight, z;

  Normalised(const QKNormRotation& a, const Tensor& x, const Tensor& narrow_weight) {
    const auto dtype = a.cos.scalar_type();
    const Tensor wide = x.to(dtype);
    rstd = at::rsqrt((wide * wide).mean(-1, /*keepdim=*/true) + a.eps);
    x_hat = wide * rstd;
    weight = a.unit_offset ? narrow_weight.to(dtype) + 1 : narrow_weight.to(dtype);
    z = x_hat * weight;
  }
};

/// `(dx, dweight)` of one tensor in differentiable operations, for second derivatives.
std::tuple<Tensor, Tensor> differentiable_gradients(
    const QKNormRotation& a,
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weight) {
  const Normalised n(a, x, weight);
  const Tensor h = dispatch::rotary_embedding(a.rotation().inverse(), grad.to(a.cos.scalar_type()));
  const Tensor dx_hat = h * n.weight;
  const Tensor dx = n.rstd * (dx_hat - n.x_hat * (dx_hat * n.x_hat).mean(-1, /*keepdim=*/true));
  const Tensor dweight = (h * n.x_hat).flatten(0, -2).sum(0);
  return {dx.to(x.scalar_type()), dweight.to(weight.scalar_type())};
}

/// Saves the arguments only: the intermediate results of the forward pass are cheaper to compute again than to store.
class QKNormRotaryEmbeddingBackward final : public autograd::Node<QKNormRotaryEmbeddingBackward> {
 public:
  QKNormRotaryEmbeddingBackward() = default;
  QKNormRotaryEmbeddingBackward(const QKNormRotation& a, const Tensor& q, const Tensor& k)
      : rotation_(a.rotation()),
        q_(q, /*is_output=*/false),
        k_(k, /*is_output=*/false),
        q_weight_(a.q_weight, /*is_output=*/false),
        k_weight_(a.k_weight, /*is_output=*/false),
        eps_(a.eps),
        unit_offset_(a.unit_offset) {}

  auto state() { return std::tie(q_, k_, q_weight_, k_weight_, rotation_, eps_, unit_offset_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(kInputs);
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const Tensor q = unpack(q_);
    const Tensor k = unpack(k_);
    const Tensor q_weight = unpack(q_weight_);
    const Tensor k_weight = unpack(k_weight_);
    const autograd::UnpackedRotation tables = rotation_.unpack();
    const QKNormRotation a{q_weight, k_weight,     tables.cos,         tables.sin,       tables.positions,
                           eps_,     unit_offset_, tables.interleaved, tables.conjugate, tables.pair_axes};
    // Gradients that are not needed are not computed.
    const auto wanted = [&](size_t i) {
      return wants(i) || wants(i + 2) ? autograd::optional_tensor(grads[i]) : std::nullopt;
    };
    const auto grad_q = wanted(0);
    const auto grad_k = wanted(1);
    if (grad_q.has_value() || grad_k.has_value()) {
      QKNormRotaryGradients gradients =
          dispatch::qk_norm_rotary_embedding_backward({/*weights_grad=*/wants(2, 4)}, {grad_q, grad_k, q, k}, a);
      result[0] = std::move(gradients.q);
      result[1] = std::move(gradients.k);
      result[2] = std::move(gradients.q_weight);
      result[3] = std::move(gradients.k_weight);
    }
    if (wants(4, 6)) {
      std::vector<Tensor> rotated_grads;
      std::vector<Tensor> rotated;
      const auto add = [&](const Tensor& grad, const Tensor& x, const Tensor& weight) {
        if (grad.defined()) {
          rotated_grads.push_back(grad.to(tables.cos.scalar_type()));
          rotated.push_back(Normalised(a, x, weight).z);
        }
      };
      add(grads[0], q, q_weight);
      add(grads[1], k, k_weight);
      std::tie(result[4], result[5]) = dispatch::rotary_embedding_tables_backward(a.rotation(), rotated_grads, rotated);
    }
    return result;
  }

 private:
  static constexpr size_t kInputs = 6;

  autograd::SavedRotation rotation_;
  SavedVariable q_, k_, q_weight_, k_weight_;
  double eps_ = 0;
  bool unit_offset_ = false;
};

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding_autograd(
    const QKNormRotation& a,
    const Tensor& q,
    const Tensor& k) {
  return autograd::forward_and_record<QKNormRotaryEmbeddingBackward>(
      "posenc::qk_norm_rotary_embedding", {q, k, a.q_weight, a.k_weight, a.cos, a.sin},
      [&] { return dispatch::qk_norm_rotary_embedding(a, q, k); }, a, q, k);
}

/// Gradients that are themselves differentiated are computed in differentiable operations.
QKNormRotaryGradients qk_norm_rotary_embedding_backward_autograd(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& a) {
  const auto& [grad_q, grad_k, q, k] = inputs;
  const Tensor none;
  const Tensor& of_q = grad_q.has_value() ? *grad_q : none;
  const Tensor& of_k = grad_k.has_value() ? *grad_k : none;
  const Differentiable differentiable{of_q, of_k, q, k, a.q_weight, a.k_weight, a.cos, a.sin};
  autograd::check_no_tangents("posenc::qk_norm_rotary_embedding_backward", differentiable);
  if (!autograd::any_requires_grad(differentiable)) {
    return autograd::below_autograd([&] { return dispatch::qk_norm_rotary_embedding_backward(mask, inputs, a); });
  }
  if (!meta::any_symbol(inputs, a)) {
    arguments::check_qk_norm_rotary_backward(a, inputs);
  }
  const auto gradients = [&](const Tensor& grad, const Tensor& x, const Tensor& weight) {
    return grad.defined() ? differentiable_gradients(a, grad, x, weight) : std::tuple<Tensor, Tensor>();
  };
  const auto [dq, dq_weight] = gradients(of_q, q, a.q_weight);
  const auto [dk, dk_weight] = gradients(of_k, k, a.k_weight);
  return mask.weights_grad ? QKNormRotaryGradients{dq, dk, dq_weight, dk_weight}
                           : QKNormRotaryGradients{dq, dk, {}, {}};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("qk_norm_rotary_embedding", kernel<qk_norm_rotary_embedding_autograd>);
  m.impl("qk_norm_rotary_embedding_backward", kernel<qk_norm_rotary_embedding_backward_autograd>);
}

}  // namespace posenc
