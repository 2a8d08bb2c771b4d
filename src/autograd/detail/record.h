#pragma once

#include <detail/torch_compat.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <tuple>
#include <utility>

// Records operators in the autograd graph. Nodes are created as LibTorch creates its own: torch::autograd::Function
// costs 2 microseconds more for each call (8.3 instead of 6.1 for q and k), in every layer of a decoder.
namespace posenc::autograd {

/// Calls `function` with the dispatch keys of autograd and of version counting excluded.
template <typename Function>
auto below_autograd(const Function& function) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return function();
}

/// The arguments of an operator that may have gradients or tangents.
using Differentiable = std::initializer_list<std::reference_wrapper<const at::Tensor>>;

/// Whether a graph is recorded and one of the tensors requires grad.
template <typename Tensors>
bool any_requires_grad(const Tensors& tensors) {
  return at::GradMode::is_enabled() &&
      std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

/// Creates a `Node` whose gradients flow to `inputs`, in that order, except to undefined ones. `args` go to its
/// constructor.
template <typename Node, typename Tensors, typename... Args>
NodePtr make_node(const Tensors& inputs, Args&&... args) {
  NodePtr node = new_node<Node>(std::forward<Args>(args)...);
  torch::autograd::edge_list edges;
  edges.reserve(inputs.size());
  for (const at::Tensor& input : inputs) {
    edges.push_back(input.defined() ? torch::autograd::impl::gradient_edge(input) : torch::autograd::Edge());
  }
  node->set_next_edges(std::move(edges));
  return node;
}

/// Makes a new `Node` the history of `outputs` if a graph is recorded and one of `inputs` requires grad. Gradients flow
/// to `inputs`, in that order; `args` go to the constructor of the node. The gradient of an undefined output is
/// undefined.
/// @return the node, which the outputs own; null if nothing is recorded.
template <typename Node, typename Tensors, typename... Args>
Node* record(
    const Tensors& inputs,
    std::initializer_list<std::reference_wrapper<const at::Tensor>> outputs,
    const Args&... args) {
  if (!any_requires_grad(inputs)) {
    return nullptr;
  }
  const NodePtr node = make_node<Node>(inputs, args...);
  for (const at::Tensor& output : outputs) {
    if (output.defined()) {
      torch::autograd::set_history(output, node);
    } else {
      node->add_input_metadata(torch::autograd::Node::undefined_input());
    }
  }
  return static_cast<Node*>(node.get());
}

/// Refuses forward-mode tangents for an operator that does not propagate them.
inline void check_no_tangent(const char* op, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(tensor), op,
      ": expected no forward-mode tangents, which it does not carry on, got some: differentiate in backward mode");
}

template <typename Tensors>
void check_no_tangents(const char* op, const Tensors& tensors) {
  for (const at::Tensor& tensor : tensors) {
    check_no_tangent(op, tensor);
  }
}

/// The outputs of an operator, a tensor or a tuple of tensors, as a tuple of references.
inline auto as_tuple(const at::Tensor& output) {
  return std::tie(output);
}
template <typename... Tensors>
auto as_tuple(const std::tuple<Tensors...>& outputs) {
  return std::apply([](const Tensors&... tensors) { return std::tie(tensors...); }, outputs);
}

/// Calls `forward`, which calls the operator `op`, below autograd and makes a new `Node` the history of its outputs, as
/// `record` does. Refuses tangents.
template <typename Node, typename Tensors = Differentiable, typename Forward, typename... Args>
auto forward_and_record(const char* op, const Tensors& inputs, const Forward& forward, const Args&... args) {
  check_no_tangents(op, inputs);
  auto outputs = below_autograd(forward);
  const auto record_all = [&](const auto&... tensors) {
    if (Node* node = record<Node>(inputs, {tensors...}, args...)) {
      node->save_outputs(tensors...);
    }
  };
  std::apply(record_all, as_tuple(outputs));
  return outputs;
}

/// Checks that a graph can record that `x`, the argument `name` of `op`, is overwritten by a value that requires grad.
/// `advice` says what to do instead.
inline void check_overwritable(const char* op, const char* name, const at::Tensor& x, const char* advice) {
  TORCH_CHECK(
      !(x.is_leaf() && x.requires_grad()), op, ": expected ", name,
      " that is no leaf of the graph, got a leaf that requires grad: its value cannot change in place; ", advice);
  torch::autograd::check_inplace(x, /*requires_grad=*/true);  // refuses views that cannot be tracked
}

/// For the key ADInplaceOrView: calls `overwrite` below it, then increments the version of each overwritten tensor, so
/// that autograd refuses values of it that were saved before.
template <typename Overwrite, typename... Tensors>
void count_versions(const Overwrite& overwrite, const Tensors&... overwritten) {
  below_autograd(overwrite);
  (torch::autograd::increment_version(overwritten), ...);
}

/// Refuses gradients through an operator that has none of its own. `advice` says what to do instead.
template <typename Tensors>
void check_no_gradients(const char* op, const Tensors& inputs, const char* advice) {
  check_no_tangents(op, inputs);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any_requires_grad(inputs), op,
      ": expected a call without gradients of its own, got an argument that requires grad: ", advice);
}

/// Records that `outputs` depend on `inputs` without a derivative: differentiating them is an error.
template <typename Tensors>
void record_no_derivative(
    const char* op,
    const Tensors& inputs,
    std::initializer_list<std::reference_wrapper<const at::Tensor>> outputs) {
  record<torch::autograd::Error>(
      inputs, outputs, c10::str(op, ": expected gradients that are not differentiated again, got a second derivative"));
}

}  // namespace posenc::autograd
