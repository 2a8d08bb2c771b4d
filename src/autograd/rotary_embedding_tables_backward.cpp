#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <autograd/detail/rotate_by_table_gradients.h>
#include <ops/rotary_embedding_tables_backward.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <tuple>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The gradients of the tables are bilinear in output gradients g and inputs x, and both derivatives are rotations
/// by the gradients (c, s) that arrive for (dcos, dsin):
///
///     <dcos, c> + <dsin, s> = <g, rotate(x; c, s)> = <x, rotate_back(g; c, s)>
class RotaryEmbeddingTablesBackwardBackward final : public autograd::Node<RotaryEmbeddingTablesBackwardBackward> {
 public:
  RotaryEmbeddingTablesBackwardBackward() = default;
  RotaryEmbeddingTablesBackwardBackward(
      at::TensorList grads,
      at::TensorList inputs,
      const Tensor& table,
      const std::optional<Tensor>& positions,
      bool interleaved,
      bool conjugate,
      at::IntArrayRef pair_axes)
      : table_(table, /*is_output=*/false),
        positions_(positions, /*is_output=*/false),
        interleaved_(interleaved),
        conjugate_(conjugate),
        pair_axes_(pair_axes.vec()) {
    for (const Tensor& grad : grads) {
      grads_.emplace_back(grad, /*is_output=*/false);
    }
    for (const Tensor& input : inputs) {
      inputs_.emplace_back(input, /*is_output=*/false);
    }
  }

  auto state() { return std::tie(grads_, inputs_, table_, positions_, interleaved_, conjugate_, pair_axes_); }

  variable_list differentiate(const variable_list& table_grads) {
    const size_t count = inputs_.size();
    variable_list result(2 * count);
    if (!table_grads[0].defined() && !table_grads[1].defined()) {
      return result;
    }
    const Tensor table = unpack(table_);
    const auto positions = unpack_optional(positions_);
    const Tensor cos = table_grads[0].defined() ? table_grads[0] : at::zeros_like(table);
    const Tensor sin = table_grads[1].defined() ? table_grads[1] : at::zeros_like(table);
    for (size_t i = 0; i < count; ++i) {
      if (wants(i)) {
        result[i] = autograd::rotate_by_table_gradients(
            unpack(inputs_[i]), cos, sin, positions, interleaved_, conjugate_, pair_axes_);
      }
      if (wants(count + i)) {
        result[count + i] = autograd::rotate_by_table_gradients(
            unpack(grads_[i]), cos, sin, positions, interleaved_, !conjugate_, pair_axes_);
      }
    }
    return result;
  }

  std::string name() const override { return "RotaryEmbeddingTablesBackwardBackward"; }

 private:
  std::vector<SavedVariable> grads_, inputs_;
  SavedVariable table_, positions_;
  bool interleaved_ = false;
  bool conjugate_ = false;
  std::vector<int64_t> pair_axes_;
};

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_autograd(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& table,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  auto table_grads = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rotary_embedding_tables_backward(grads, inputs, table, positions, interleaved, conjugate, pair_axes);
  }();
  std::vector<std::reference_wrapper<const Tensor>> differentiable(grads.begin(), grads.end());
  std::copy(inputs.begin(), inputs.end(), std::back_inserter(differentiable));
  for (const Tensor& tensor : differentiable) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !torch::autograd::isFwGradDefined(tensor),
        "posenc::rotary_embedding_tables_backward: expected no forward-mode tangents, which it does not carry on, got "
        "some: differentiate the gradients of cos and sin in backward mode");
  }
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<RotaryEmbeddingTablesBackwardBackward>(
        differentiable, grads, inputs, table, positions, interleaved, conjugate, pair_axes);
    torch::autograd::set_history(std::get<0>(table_grads), node);
    torch::autograd::set_history(std::get<1>(table_grads), node);
  }
  return table_grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding_tables_backward", rotary_embedding_tables_backward_autograd);
}

}  // namespace posenc
