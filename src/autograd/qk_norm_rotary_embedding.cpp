#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <contract/qk_norm_rotary_embedding.h>
#include <meta/detail/symbolic.h>
#include <ops/qk_norm_rotary_embedding.h>
#include <ops/rotary_embedding_tables_backward.h>
#include <posenc/qk_norm_rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <functional>
#include <tuple>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct Settings {
  double eps = 0;
  bool unit_offset = false;
  bool interleaved = false;
  bool conjugate = false;
  std::vector<int64_t> pair_axes;

  auto state() { return std::tie(eps, unit_offset, interleaved, conjugate, pair_axes); }
};

/// The tensors that both heads of a call share.
struct Tables {
  const Tensor& cos;
  const Tensor& sin;
  const std::optional<Tensor>& positions;
};

/// The normalised input, in the dtype of the arithmetic, and what it is made with, in tensor operations: for what the
/// kernels do not compute.
struct Normalised {
  Tensor rstd, x_hat, weight, z;

  Normalised(const Tensor& x, const Tensor& narrow_weight, const Tensor& table, const Settings& settings) {
    const auto dtype = table.scalar_type();
    const Tensor wide = x.to(dtype);
    rstd = at::rsqrt((wide * wide).mean(-1, /*keepdim=*/true) + settings.eps);
    x_hat = wide * rstd;
    weight = settings.unit_offset ? narrow_weight.to(dtype) + 1 : narrow_weight.to(dtype);
    z = x_hat * weight;
  }
};

/// `(dx, dweight)` of one tensor in differentiable operations: its own derivatives are the second ones of the operator.
std::tuple<Tensor, Tensor> differentiable_gradients(
    const Tensor& grad,
    const Tensor& x,
    const Tensor& weight,
    const Tables& tables,
    const Settings& settings) {
  const Normalised n(x, weight, tables.cos, settings);
  const Tensor h = rotary_embedding(
      grad.to(tables.cos.scalar_type()), tables.cos, tables.sin, tables.positions, settings.interleaved,
      !settings.conjugate, settings.pair_axes);
  const Tensor dx_hat = h * n.weight;
  const Tensor dx = n.rstd * (dx_hat - n.x_hat * (dx_hat * n.x_hat).mean(-1, /*keepdim=*/true));
  const Tensor dweight = (h * n.x_hat).flatten(0, -2).sum(0);
  return {dx.to(x.scalar_type()), dweight.to(weight.scalar_type())};
}

/// Saves the arguments alone: what the forward pass computes on the way is cheaper to compute again than to store.
class QKNormRotaryEmbeddingBackward final : public autograd::Node<QKNormRotaryEmbeddingBackward> {
 public:
  QKNormRotaryEmbeddingBackward() = default;
  QKNormRotaryEmbeddingBackward(
      const Tensor& q,
      const Tensor& k,
      const Tensor& q_weight,
      const Tensor& k_weight,
      const Tables& tables,
      const Settings& settings)
      : q_(q, /*is_output=*/false),
        k_(k, /*is_output=*/false),
        q_weight_(q_weight, /*is_output=*/false),
        k_weight_(k_weight, /*is_output=*/false),
        cos_(tables.cos, /*is_output=*/false),
        sin_(tables.sin, /*is_output=*/false),
        positions_(tables.positions, /*is_output=*/false),
        settings_(settings) {}

  auto state() {
    return std::tuple_cat(std::tie(q_, k_, q_weight_, k_weight_, cos_, sin_, positions_), settings_.state());
  }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(kInputs);
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const Tensor q = unpack(q_);
    const Tensor k = unpack(k_);
    const Tensor q_weight = unpack(q_weight_);
    const Tensor k_weight = unpack(k_weight_);
    const Tensor cos = unpack(cos_);
    const Tensor sin = unpack(sin_);
    const auto positions = unpack_optional(positions_);
    // A gradient that nobody asks for is not computed.
    const auto wanted = [&](size_t i) {
      return wants(i) || wants(i + 2) ? autograd::optional_tensor(grads[i]) : std::nullopt;
    };
    const auto grad_q = wanted(0);
    const auto grad_k = wanted(1);
    if (grad_q.has_value() || grad_k.has_value()) {
      std::tie(result[0], result[1], result[2], result[3]) = qk_norm_rotary_embedding_backward(
          grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, positions, settings_.eps, settings_.unit_offset,
          settings_.interleaved, settings_.conjugate, settings_.pair_axes,
          /*weights_grad=*/wants(2, 4));
    }
    if (wants(4, 6)) {
      std::vector<Tensor> rotated_grads;
      std::vector<Tensor> rotated;
      const auto add = [&](const Tensor& grad, const Tensor& x, const Tensor& weight) {
        if (grad.defined()) {
          rotated_grads.push_back(grad.to(cos.scalar_type()));
          rotated.push_back(Normalised(x, weight, cos, settings_).z);
        }
      };
      add(grads[0], q, q_weight);
      add(grads[1], k, k_weight);
      std::tie(result[4], result[5]) = rotary_embedding_tables_backward(
          rotated_grads, rotated, cos, positions, settings_.interleaved, settings_.conjugate, settings_.pair_axes);
    }
    return result;
  }

  std::string name() const override { return "QKNormRotaryEmbeddingBackward"; }

 private:
  static constexpr size_t kInputs = 6;

  SavedVariable q_, k_, q_weight_, k_weight_, cos_, sin_, positions_;
  Settings settings_;
};

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding_autograd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& q_weight,
    const Tensor& k_weight,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    double eps,
    bool unit_offset,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const std::array<std::reference_wrapper<const Tensor>, 6> differentiable{q, k, q_weight, k_weight, cos, sin};
  for (const Tensor& tensor : differentiable) {
    autograd::check_no_tangent("posenc::qk_norm_rotary_embedding", tensor);
  }
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return qk_norm_rotary_embedding(
        q, k, q_weight, k_weight, cos, sin, positions, eps, unit_offset, interleaved, conjugate, pair_axes);
  }();
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<QKNormRotaryEmbeddingBackward>(
        differentiable, q, k, q_weight, k_weight, Tables{cos, sin, positions},
        Settings{eps, unit_offset, interleaved, conjugate, pair_axes.vec()});
    torch::autograd::set_history(std::get<0>(outputs), node);
    torch::autograd::set_history(std::get<1>(outputs), node);
  }
  return outputs;
}

/// Where the gradients are to be differentiated, they are made of operations that can be.
std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rotary_embedding_backward_autograd(
    const std::optional<Tensor>& grad_q,
    const std::optional<Tensor>& grad_k,
    const Tensor& q,
    const Tensor& k,
    const Tensor& q_weight,
    const Tensor& k_weight,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    double eps,
    bool unit_offset,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes,
    bool weights_grad) {
  const Tensor none;
  const std::array<std::reference_wrapper<const Tensor>, 8> differentiable{
      grad_q.has_value() ? *grad_q : none, grad_k.has_value() ? *grad_k : none, q, k, q_weight, k_weight, cos, sin};
  for (const Tensor& tensor : differentiable) {
    autograd::check_no_tangent("posenc::qk_norm_rotary_embedding_backward", tensor);
  }
  if (!autograd::any_requires_grad(differentiable)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return qk_norm_rotary_embedding_backward(
        grad_q, grad_k, q, k, q_weight, k_weight, cos, sin, positions, eps, unit_offset, interleaved, conjugate,
        pair_axes, weights_grad);
  }
  if (!std::any_of(differentiable.begin(), differentiable.end(), meta::has_symbolic_sizes) &&
      !(positions.has_value() && meta::has_symbolic_sizes(*positions))) {
    contract::check_qk_norm_rotary_backward(
        {{"posenc::qk_norm_rotary_embedding_backward", cos, sin, positions, interleaved, conjugate, pair_axes},
         q,
         k,
         q_weight,
         k_weight,
         eps,
         unit_offset},
        grad_q, grad_k);
  }
  const Tables tables{cos, sin, positions};
  const Settings settings{eps, unit_offset, interleaved, conjugate, pair_axes.vec()};
  const auto gradients_of = [&](const std::optional<Tensor>& grad, const Tensor& x, const Tensor& weight) {
    auto gradients = grad.has_value() && grad->defined() ? differentiable_gradients(*grad, x, weight, tables, settings)
                                                         : std::tuple<Tensor, Tensor>();
    if (!weights_grad) {
      std::get<1>(gradients) = Tensor();
    }
    return gradients;
  };
  const auto [dq, dq_weight] = gradients_of(grad_q, q, q_weight);
  const auto [dk, dk_weight] = gradients_of(grad_k, k, k_weight);
  return {dq, dk, dq_weight, dk_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("qk_norm_rotary_embedding", qk_norm_rotary_embedding_autograd);
  m.impl("qk_norm_rotary_embedding_backward", qk_norm_rotary_embedding_backward_autograd);
}

}  // namespace posenc
