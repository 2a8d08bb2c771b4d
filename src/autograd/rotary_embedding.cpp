#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <autograd/detail/rotate_by_table_gradients.h>
#include <ops/rotary_embedding_backward.h>
#include <ops/rotary_embedding_tables_backward.h>
#include <posenc/rotary_embedding.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The gradient of a rotation is the rotation backwards, done by the operator itself, so that it can be
/// differentiated again. Saves the inputs only where the tables need a gradient.
class RotaryEmbeddingBackward final : public autograd::Node<RotaryEmbeddingBackward> {
 public:
  RotaryEmbeddingBackward() = default;
  RotaryEmbeddingBackward(
      at::ArrayRef<std::reference_wrapper<const Tensor>> inputs,
      const Tensor& cos,
      const Tensor& sin,
      const std::optional<Tensor>& positions,
      bool interleaved,
      bool conjugate,
      at::IntArrayRef pair_axes)
      : num_inputs_(static_cast<int64_t>(inputs.size())),
        cos_(cos, /*is_output=*/false),
        sin_(sin, /*is_output=*/false),
        positions_(positions, /*is_output=*/false),
        interleaved_(interleaved),
        conjugate_(conjugate),
        pair_axes_(pair_axes.vec()) {
    if (cos.requires_grad() || sin.requires_grad()) {
      for (size_t i = 0; i < inputs.size(); ++i) {
        inputs_[i] = SavedVariable(inputs[i].get(), /*is_output=*/false);
      }
    }
  }

  auto state() { return std::tie(num_inputs_, inputs_, cos_, sin_, positions_, interleaved_, conjugate_, pair_axes_); }

  variable_list differentiate(const variable_list& grads) {
    const Tensor cos = unpack(cos_);
    const Tensor sin = unpack(sin_);
    const auto positions = unpack_optional(positions_);

    const auto num_inputs = static_cast<size_t>(num_inputs_);
    variable_list result(num_inputs + 2);
    const auto wanted = [&](size_t i) { return grads[i].defined() && wants(i); };
    const bool tables_wanted = wants(num_inputs, num_inputs + 2);
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
    // In one pass over memory, unless it is recorded: then by the operators that know their derivatives.
    if (all_wanted && !at::GradMode::is_enabled()) {
      auto [input_grads, grad_cos, grad_sin] =
          rotary_embedding_backward(output_grads, inputs, cos, sin, positions, interleaved_, conjugate_, pair_axes_);
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

    if (num_inputs == 2 && wanted(0) && wanted(1)) {
      std::tie(result[0], result[1]) =
          rotary_embedding_qk(grads[0], grads[1], cos, sin, positions, interleaved_, !conjugate_, pair_axes_);
    } else {
      for (size_t i = 0; i < num_inputs; ++i) {
        if (wanted(i)) {
          result[i] = rotary_embedding(grads[i], cos, sin, positions, interleaved_, !conjugate_, pair_axes_);
        }
      }
    }

    if (tables_wanted) {
      std::tie(result[num_inputs], result[num_inputs + 1]) =
          rotary_embedding_tables_backward(output_grads, inputs, cos, positions, interleaved_, conjugate_, pair_axes_);
    }
    return result;
  }

  std::string name() const override { return "RotaryEmbeddingBackward"; }

 private:
  int64_t num_inputs_ = 0;
  std::array<SavedVariable, 2> inputs_;
  SavedVariable cos_, sin_, positions_;
  bool interleaved_ = false;
  bool conjugate_ = false;
  std::vector<int64_t> pair_axes_;
};

/// Forward mode: a rotation is linear in its input and in its tables, so the tangent is the input's tangent
/// rotated plus the input rotated by the tables' tangents.
void set_tangent(
    const Tensor& output,
    const Tensor& input,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const bool by_input = torch::autograd::isFwGradDefined(input);
  const bool by_tables = torch::autograd::isFwGradDefined(cos) || torch::autograd::isFwGradDefined(sin);
  if (!by_input && !by_tables) {
    return;
  }
  const Tensor primal_cos = cos._fw_primal(/*level=*/0);
  const Tensor primal_sin = sin._fw_primal(/*level=*/0);
  Tensor tangent;
  if (by_input) {
    tangent = rotary_embedding(
        input._fw_grad(/*level=*/0), primal_cos, primal_sin, positions, interleaved, conjugate, pair_axes);
  }
  if (by_tables) {
    const auto tangent_or_zeros = [](const Tensor& table, const Tensor& primal) {
      const Tensor& table_tangent = table._fw_grad(/*level=*/0);
      return table_tangent.defined() ? table_tangent : at::zeros_like(primal);
    };
    const Tensor of_tables = autograd::rotate_by_table_gradients(
        input._fw_primal(/*level=*/0), tangent_or_zeros(cos, primal_cos), tangent_or_zeros(sin, primal_sin), positions,
        interleaved, conjugate, pair_axes);
    tangent = tangent.defined() ? tangent.add(of_tables) : of_tables;
  }
  output._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

Tensor rotary_embedding_autograd(
    const Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  Tensor output = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rotary_embedding(x, cos, sin, positions, interleaved, conjugate, pair_axes);
  }();
  const std::array<std::reference_wrapper<const Tensor>, 3> differentiable{x, cos, sin};
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<RotaryEmbeddingBackward>(
        differentiable, at::ArrayRef(differentiable).slice(0, 1), cos, sin, positions, interleaved, conjugate,
        pair_axes);
    torch::autograd::set_history(output, node);
  }
  set_tangent(output, x, cos, sin, positions, interleaved, conjugate, pair_axes);
  return output;
}

std::tuple<Tensor, Tensor> rotary_embedding_qk_autograd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rotary_embedding_qk(q, k, cos, sin, positions, interleaved, conjugate, pair_axes);
  }();
  const auto& [q_out, k_out] = outputs;
  const std::array<std::reference_wrapper<const Tensor>, 4> differentiable{q, k, cos, sin};
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<RotaryEmbeddingBackward>(
        differentiable, at::ArrayRef(differentiable).slice(0, 2), cos, sin, positions, interleaved, conjugate,
        pair_axes);
    torch::autograd::set_history(q_out, node);
    torch::autograd::set_history(k_out, node);
  }
  set_tangent(q_out, q, cos, sin, positions, interleaved, conjugate, pair_axes);
  set_tangent(k_out, k, cos, sin, positions, interleaved, conjugate, pair_axes);
  return outputs;
}

/// What in-place rotation asks of arguments that are part of a graph.
void check_can_change(const char* op, const char* name, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  TORCH_CHECK(
      !cos.requires_grad() && !sin.requires_grad(), op,
      ": expected cos and sin that require no grad, got one that does: its gradient needs the input, which is "
      "overwritten; rotate out of place");
  TORCH_CHECK(
      !(x.is_leaf() && x.requires_grad()), op, ": expected ", name,
      " that is no leaf of the graph, got a leaf that requires grad: its value cannot change in place; rotate out of "
      "place");
  torch::autograd::check_inplace(x, x.requires_grad());  // views that cannot be tracked
}

void rotary_embedding_autograd_(
    Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  constexpr const char* kOp = "posenc::rotary_embedding_";
  for (const Tensor* tensor : {static_cast<const Tensor*>(&x), &cos, &sin}) {
    autograd::check_no_tangent(kOp, *tensor);
  }
  const std::array<std::reference_wrapper<const Tensor>, 3> differentiable{x, cos, sin};
  NodePtr node;
  if (autograd::any_requires_grad(differentiable)) {
    check_can_change(kOp, "x", x, cos, sin);
    node = autograd::make_node<RotaryEmbeddingBackward>(
        differentiable, at::ArrayRef(differentiable).slice(0, 1), cos, sin, positions, interleaved, conjugate,
        pair_axes);
  }
  {
    const at::AutoDispatchBelowAutograd below_autograd;  // to the kernel below that counts versions
    rotary_embedding_(x, cos, sin, positions, interleaved, conjugate, pair_axes);
  }
  if (node != nullptr) {
    torch::autograd::rebase_history(x, node);
  }
}

void rotary_embedding_qk_autograd_(
    Tensor& q,
    Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  constexpr const char* kOp = "posenc::rotary_embedding_qk_";
  for (const Tensor* tensor : {static_cast<const Tensor*>(&q), static_cast<const Tensor*>(&k), &cos, &sin}) {
    autograd::check_no_tangent(kOp, *tensor);
  }
  using Differentiable = std::vector<std::reference_wrapper<const Tensor>>;
  const Differentiable all{q, k, cos, sin};
  const bool records = autograd::any_requires_grad(all);
  const bool q_records = records && q.requires_grad();
  const bool k_records = records && k.requires_grad();
  // One node, and so one launch, for both; but a view has a history of its own, which takes a node of one output.
  const bool shared = q_records && k_records && !q.is_view() && !k.is_view();
  const auto node_of = [&](const Differentiable& inputs) {
    Differentiable differentiable = inputs;
    differentiable.insert(differentiable.end(), {std::cref(cos), std::cref(sin)});
    return autograd::make_node<RotaryEmbeddingBackward>(
        differentiable, at::ArrayRef(inputs), cos, sin, positions, interleaved, conjugate, pair_axes);
  };
  NodePtr q_node;
  NodePtr k_node;
  if (records) {
    check_can_change(kOp, "q", q, cos, sin);
    check_can_change(kOp, "k", k, cos, sin);
    if (shared) {
      q_node = node_of({q, k});
    } else {
      q_node = q_records ? node_of({q}) : NodePtr();
      k_node = k_records ? node_of({k}) : NodePtr();
    }
  }
  {
    const at::AutoDispatchBelowAutograd below_autograd;
    rotary_embedding_qk_(q, k, cos, sin, positions, interleaved, conjugate, pair_axes);
  }
  if (shared) {
    torch::autograd::rebase_history(std::vector<Tensor>{q, k}, q_node);
  } else {
    for (const auto& [tensor, node] : {std::pair(&q, q_node), std::pair(&k, k_node)}) {
      if (node != nullptr) {
        torch::autograd::rebase_history(*tensor, node);
      }
    }
  }
}

/// Tells autograd that values saved of `x` are stale.
void rotary_embedding_version_(
    Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  {
    const at::AutoDispatchBelowADInplaceOrView below_version;
    rotary_embedding_(x, cos, sin, positions, interleaved, conjugate, pair_axes);
  }
  torch::autograd::increment_version(x);
}

void rotary_embedding_qk_version_(
    Tensor& q,
    Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  {
    const at::AutoDispatchBelowADInplaceOrView below_version;
    rotary_embedding_qk_(q, k, cos, sin, positions, interleaved, conjugate, pair_axes);
  }
  torch::autograd::increment_version(q);
  torch::autograd::increment_version(k);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding", rotary_embedding_autograd);
  m.impl("rotary_embedding_", rotary_embedding_autograd_);
  m.impl("rotary_embedding_qk", rotary_embedding_qk_autograd);
  m.impl("rotary_embedding_qk_", rotary_embedding_qk_autograd_);
}

TORCH_LIBRARY_IMPL(posenc, ADInplaceOrView, m) {
  m.impl("rotary_embedding_", rotary_embedding_version_);
  m.impl("rotary_embedding_qk_", rotary_embedding_qk_version_);
}

}  // namespace posenc
