#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <autograd/detail/rotate_by_table_gradients.h>
#include <autograd/detail/saved_rotation.h>
#include <ops/dispatch.h>
#include <ops/rotary_embedding.h>

#include <ATen/ops/zeros_like.h>
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
      : rotation_(rotation), num_inputs_(static_cast<int64_t>(inputs.size())) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      grads_[i] = SavedVariable(grads[i], /*is_output=*/false);
      inputs_[i] = SavedVariable(inputs[i], /*is_output=*/false);
    }
  }

  auto state() { return std::tie(rotation_, num_inputs_, grads_, inputs_); }

  variable_list differentiate(const variable_list& table_grads) {
    const auto count = static_cast<size_t>(num_inputs_);
    variable_list result(2 * count);
    if (!table_grads[0].defined() && !table_grads[1].defined()) {
      return result;
    }
    UnpackedRotation rotation = rotation_.unpack();
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

 private:
  SavedRotation rotation_;
  int64_t num_inputs_ = 0;
  std::array<SavedVariable, 2> grads_, inputs_;
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
  return autograd::forward_and_record<RotaryEmbeddingTablesBackwardBackward>(
      "posenc::rotary_embedding_tables_backward", joined(grads, inputs),
      [&] { return dispatch::rotary_embedding_tables_backward(rotation, grads, inputs); }, rotation, grads, inputs);
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
