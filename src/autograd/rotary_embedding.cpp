#include <arguments/rotary_embedding.h>
#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <autograd/detail/rotate_by_table_gradients.h>
#include <autograd/detail/saved_rotation.h>
#include <ops/dispatch.h>
#include <ops/rotary_embedding.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

namespace posenc {
namespace {

using arguments::NamedTensor;
using arguments::RotatedList;
using at::Tensor;
using autograd::Differentiable;
using autograd::SavedRotation;
using autograd::UnpackedRotation;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The gradient of q and k is the gradient of the outputs rotated by the negative angles. It is computed by the same
/// operator, so that it can be differentiated again. q and k are saved only if cos or sin requires a gradient.
class RotaryEmbeddingBackward final : public autograd::Node<RotaryEmbeddingBackward> {
 public:
  RotaryEmbeddingBackward() = default;
  /// @param inputs  the tensor that is rotated, or q and k.
  RotaryEmbeddingBackward(const Rotation& rotation, Differentiable inputs)
      : rotation_(rotation), num_inputs_(static_cast<int64_t>(inputs.size())) {
    if (autograd::tables_require_grad(rotation)) {
      for (size_t i = 0; i < inputs.size(); ++i) {
        inputs_[i] = SavedVariable(inputs.begin()[i].get(), /*is_output=*/false);
      }
    }
  }

  auto state() { return std::tie(num_inputs_, inputs_, rotation_); }

  variable_list differentiate(const variable_list& grads) {
    const UnpackedRotation rotation = rotation_.unpack();
    const auto num_inputs = static_cast<size_t>(num_inputs_);
    variable_list result(num_inputs + 2);
    const bool tables_wanted = wants(num_inputs, num_inputs + 2);
    // For the outputs that have a gradient:
    variable_list inputs;
    variable_list output_grads;
    bool all_wanted = tables_wanted;
    if (tables_wanted) {
      for (size_t i = 0; i < num_inputs; ++i) {
        if (grads[i].defined()) {
          inputs.push_back(unpack(inputs_[i]));
          output_grads.push_back(grads[i]);
          all_wanted = all_wanted && wants(i);
        }
      }
      if (inputs.empty()) {
        return result;
      }
    }
    // One pass over memory, unless a graph is recorded: then two operators that are differentiable.
    if (all_wanted && !at::GradMode::is_enabled()) {
      auto [input_grads, grad_cos, grad_sin] = dispatch::rotary_embedding_backward(rotation, output_grads, inputs);
      size_t next = 0;
      for (size_t i = 0; i < num_inputs; ++i) {
        if (grads[i].defined()) {
          result[i] = std::move(input_grads[next++]);
        }
      }
      result[num_inputs] = std::move(grad_cos);
      result[num_inputs + 1] = std::move(grad_sin);
      return result;
    }
    rotate_back(rotation, grads, result);
    if (tables_wanted) {
      std::tie(result[num_inputs], result[num_inputs + 1]) =
          dispatch::rotary_embedding_tables_backward(rotation, output_grads, inputs);
    }
    return result;
  }

 private:
  /// The gradients of the inputs, of two in one launch.
  void rotate_back(const Rotation& rotation, const variable_list& grads, variable_list& result) {
    const auto wanted = [&](size_t i) { return grads[i].defined() && wants(i); };
    const Rotation inverse = rotation.inverse();
    if (num_inputs_ == 2 && wanted(0) && wanted(1)) {
      std::tie(result[0], result[1]) = dispatch::rotary_embedding_qk(inverse, grads[0], grads[1]);
      return;
    }
    for (size_t i = 0; i < static_cast<size_t>(num_inputs_); ++i) {
      if (wanted(i)) {
        result[i] = dispatch::rotary_embedding(inverse, grads[i]);
      }
    }
  }

  SavedRotation rotation_;
  int64_t num_inputs_ = 0;
  std::array<SavedVariable, 2> inputs_;
};

/// Forward mode: a rotation is linear in its input and in its tables, so the tangent is the input's tangent
/// rotated plus the input rotated by the tables' tangents.
void set_tangent(const Rotation& rotation, const Tensor& input, const Tensor& output) {
  const bool by_input = torch::autograd::isFwGradDefined(input);
  const bool by_tables =
      torch::autograd::isFwGradDefined(rotation.cos) || torch::autograd::isFwGradDefined(rotation.sin);
  if (!by_input && !by_tables) {
    return;
  }
  const auto with_tables = [&](const Tensor& cos, const Tensor& sin) {
    return Rotation{cos, sin, rotation.positions, rotation.interleaved, rotation.conjugate, rotation.pair_axes};
  };
  const Tensor cos = rotation.cos._fw_primal(/*level=*/0);
  const Tensor sin = rotation.sin._fw_primal(/*level=*/0);
  Tensor tangent;
  if (by_input) {
    tangent = dispatch::rotary_embedding(with_tables(cos, sin), input._fw_grad(/*level=*/0));
  }
  if (by_tables) {
    const auto tangent_or_zeros = [](const Tensor& table, const Tensor& primal) {
      const Tensor& table_tangent = table._fw_grad(/*level=*/0);
      return table_tangent.defined() ? table_tangent : at::zeros_like(primal);
    };
    const Tensor cos_tangent = tangent_or_zeros(rotation.cos, cos);
    const Tensor sin_tangent = tangent_or_zeros(rotation.sin, sin);
    const Tensor of_tables =
        autograd::rotate_by_table_gradients(with_tables(cos_tangent, sin_tangent), input._fw_primal(/*level=*/0));
    tangent = tangent.defined() ? tangent.add(of_tables) : of_tables;
  }
  output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

/// One of the two operators `kRotate` that rotate out of place.
template <auto kRotate, typename... Inputs>
auto rotate_autograd(const Rotation& rotation, const Inputs&... inputs) {
  auto outputs = autograd::below_autograd([&] { return kRotate(rotation, inputs...); });
  const auto record = [&](const auto&... rotated) {
    autograd::record<RotaryEmbeddingBackward>(
        Differentiable{inputs..., rotation.cos, rotation.sin}, {rotated...}, rotation, Differentiable{inputs...});
    (set_tangent(rotation, inputs, rotated), ...);
  };
  std::apply(record, autograd::as_tuple(outputs));
  return outputs;
}

// --- In place ---------------------------------------------------------------------------------------------------

/// Checks of rotations in place.
/// @return whether a graph is recorded.
bool check_in_place(const char* op, const Rotation& rotation, RotatedList inputs) {
  bool records = autograd::tables_require_grad(rotation);
  autograd::check_no_tangents(op, Differentiable{rotation.cos, rotation.sin});
  for (const auto& [name, x] : inputs) {
    autograd::check_no_tangent(op, x);
    records = records || x.requires_grad();
  }
  if (!records || !at::GradMode::is_enabled()) {
    return false;
  }
  TORCH_CHECK(
      !autograd::tables_require_grad(rotation), op,
      ": expected cos and sin that require no grad, got one that does: its gradient needs the input, which is "
      "overwritten; rotate out of place");
  for (const auto& [name, x] : inputs) {
    if (x.requires_grad()) {
      autograd::check_overwritable(op, name, x, "rotate out of place");
    }
  }
  return true;
}

/// The node of inputs that are rotated in place; one launch computes the gradients of all of them.
NodePtr node_in_place(const Rotation& rotation, Differentiable inputs) {
  std::vector<std::reference_wrapper<const Tensor>> differentiable(inputs);
  differentiable.insert(differentiable.end(), {std::cref(rotation.cos), std::cref(rotation.sin)});
  return autograd::make_node<RotaryEmbeddingBackward>(differentiable, rotation, inputs);
}

/// Calls `rotate`, which is the operator `op` and overwrites `inputs`, and makes nodes their history.
template <typename Rotate>
void rotate_in_place(const char* op, const Rotation& rotation, RotatedList inputs, const Rotate& rotate) {
  NodePtr nodes[2];  // of the inputs that require grad
  if (check_in_place(op, rotation, inputs)) {
    // One node for both, unless one is a view: the history of a view needs a node with one output.
    const bool shared = inputs.size() == 2 && std::all_of(inputs.begin(), inputs.end(), [](const NamedTensor& x) {
                          return x.tensor.requires_grad() && !x.tensor.is_view();
                        });
    if (shared) {
      nodes[0] = nodes[1] = node_in_place(rotation, {inputs[0].tensor, inputs[1].tensor});
    } else {
      for (size_t i = 0; i < inputs.size(); ++i) {
        nodes[i] = inputs[i].tensor.requires_grad() ? node_in_place(rotation, {inputs[i].tensor}) : NodePtr();
      }
    }
  }
  {
    const at::AutoDispatchBelowAutograd below_autograd;  // to the kernel below, which counts versions
    rotate();
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (nodes[i] != nullptr) {
      const uint32_t output = nodes[i]->add_input_metadata(inputs[i].tensor);
      torch::autograd::impl::rebase_history(inputs[i].tensor, {std::move(nodes[i]), output});
    }
  }
}

void rotary_embedding_autograd_(const Rotation& rotation, Tensor& x) {
  rotate_in_place("posenc::rotary_embedding_", rotation, {{"x", x}}, [&] { dispatch::rotary_embedding_(rotation, x); });
}

void rotary_embedding_qk_autograd_(const Rotation& rotation, Tensor& q, Tensor& k) {
  rotate_in_place("posenc::rotary_embedding_qk_", rotation, {{"q", q}, {"k", k}}, [&] {
    dispatch::rotary_embedding_qk_(rotation, q, k);
  });
}

template <auto kRotate, typename... Inputs>
void rotate_in_place_version(const Rotation& rotation, Inputs&... inputs) {
  autograd::count_versions([&] { kRotate(rotation, inputs...); }, inputs...);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding", kernel<rotate_autograd<dispatch::rotary_embedding, Tensor>>);
  m.impl("rotary_embedding_", kernel<rotary_embedding_autograd_>);
  m.impl("rotary_embedding_qk", kernel<rotate_autograd<dispatch::rotary_embedding_qk, Tensor, Tensor>>);
  m.impl("rotary_embedding_qk_", kernel<rotary_embedding_qk_autograd_>);
}

TORCH_LIBRARY_IMPL(posenc, ADInplaceOrView, m) {
  m.impl("rotary_embedding_", kernel<rotate_in_place_version<dispatch::rotary_embedding_, Tensor>>);
  m.impl("rotary_embedding_qk_", kernel<rotate_in_place_version<dispatch::rotary_embedding_qk_, Tensor, Tensor>>);
}

}  // namespace posenc
