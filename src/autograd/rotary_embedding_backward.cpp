#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <autograd/detail/rotate_by_table_gradients.h>
#include <ops/dispatch.h>
#include <ops/rotary_embedding.h>

#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using autograd::SavedRotation;
using autograd::UnpackedRotation;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The gradients of the tables are bilinear in output gradients g and inputs x. Both derivatives are rotations by the
/// incoming gradients (c, s) of (dcos, dsin):
///
///     <dcos, c> + <dsin, s> = <g, rotate(x; c, s)> = <x, rotate_inverse(g; c, s)>
class RotaryEmbeddingTablesBackwardBackward final : public autograd::Node<RotaryEmbeddingTablesBackwardBackward> {
 public:
  RotaryEmbeddingTablesBackwardBackward() = default;
  RotaryEmbeddingTablesBackwardBackward(const Rotation& rotation, at::TensorList grads, at::TensorList inputs)
      : rotation_(rotation) {
    for (const Tensor& grad : grads) {
      grads_.emplace_back(grad, /*is_output=*/false);
    }
    for (const Tensor& input : inputs) {
      inputs_.emplace_back(input, /*is_output=*/false);
    }
  }

  auto state() { return std::tuple_cat(std::tie(grads_, inputs_), rotation_.state()); }

  variable_list differentiate(const variable_list& table_grads) {
    const size_t count = inputs_.size();
    variable_list result(2 * count);
    if (!table_grads[0].defined() && !table_grads[1].defined()) {
      return result;
    }
    UnpackedRotation rotation = unpack(rotation_);
    rotation.cos = table_grads[0].defined() ? table_grads[0] : at::zeros_like(rotation.cos);
    rotation.sin = table_grads[1].defined() ? table_grads[1] : at::zeros_like(rotation.sin);
    const Rotation by_grads = rotation;
    for (size_t i = 0; i < count; ++i) {
      if (wants(i)) {
        result[i] = autograd::rotate_by_table_gradients(by_grads, unpack(inputs_[i]));
      }
      if (wants(count + i)) {
        result[count + i] = autograd::rotate_by_table_gradients(by_grads.inverse(), unpack(grads_[i]));
      }
    }
    return result;
  }

  std::string name() const override { return "RotaryEmbeddingTablesBackwardBackward"; }

 private:
  SavedRotation rotation_;
  std::vector<SavedVariable> grads_, inputs_;
};

std::vector<std::reference_wrapper<const Tensor>> joined(at::TensorList grads, at::TensorList inputs) {
  std::vector<std::reference_wrapper<const Tensor>> tensors(grads.begin(), grads.end());
  tensors.insert(tensors.end(), inputs.begin(), inputs.end());
  return tensors;
}

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_autograd(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  const auto differentiable = joined(grads, inputs);
  autograd::check_no_tangents("posenc::rotary_embedding_tables_backward", differentiable);
  auto table_grads =
      autograd::below_autograd([&] { return dispatch::rotary_embedding_tables_backward(rotation, grads, inputs); });
  const auto& [grad_cos, grad_sin] = table_grads;
  autograd::record<RotaryEmbeddingTablesBackwardBackward>(
      differentiable, {grad_cos, grad_sin}, rotation, grads, inputs);
  return table_grads;
}

/// Gradients that are themselves differentiated, in either mode, are computed by two operators that are differentiable.
std::tuple<std::vector<Tensor>, Tensor, Tensor> rotary_embedding_backward_autograd(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  auto differentiable = joined(grads, inputs);
  differentiable.insert(differentiable.end(), {rotation.cos, rotation.sin});
  const bool has_tangent = std::any_of(differentiable.begin(), differentiable.end(), [](const Tensor& tensor) {
    return torch::autograd::isFwGradDefined(tensor);
  });
  if (has_tangent || autograd::any_requires_grad(differentiable)) {
    return rotary_embedding_backward_by_parts(rotation, grads, inputs);
  }
  return autograd::below_autograd([&] { return dispatch::rotary_embedding_backward(rotation, grads, inputs); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding_tables_backward", kernel<rotary_embedding_tables_backward_autograd>);
  m.impl("rotary_embedding_backward", kernel<rotary_embedding_backward_autograd>);
}

}  // namespace posenc
