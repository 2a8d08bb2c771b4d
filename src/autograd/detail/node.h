#pragma once

#include <detail/torch_compat.h>

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// Base of all nodes of the autograd graph: lock, release of saved variables and compiled autograd.
namespace posenc::autograd {

/// The argument, or an undefined tensor if it is absent. Saved variables store optional arguments like this.
inline at::Tensor or_undefined(const std::optional<at::Tensor>& argument) {
  return argument.value_or(at::Tensor());
}

/// The inverse of `or_undefined`.
inline std::optional<at::Tensor> optional_tensor(at::Tensor tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(std::move(tensor)) : std::nullopt;
}

/// Base of a node. `Derived` has a default constructor and two member functions that this class can access:
///
///     auto state() { return std::tie(x_, rotation_, dtype_); }
///     variable_list differentiate(const variable_list& grads);
///
/// `state` names everything that `differentiate` reads: saved variables (`SavedVariable`), values with a
/// `torch::dynamo::autograd::IValuePacker` (bool, int64_t, double, dtype, SymInt, std::string, `std::vector` and
/// `std::optional` of these), each of them alone or in a `std::array`, and structs that have a `state` of their own. A
/// `c10::SymInt` becomes an argument of a compiled graph, the other values constants of it.
///
/// `differentiate` returns one gradient, possibly undefined, for each input of the node.
template <typename Derived>
class Node : public torch::autograd::Node {
 public:
  using SavedVariable = torch::autograd::SavedVariable;
  using variable_list = torch::autograd::variable_list;

  /// The name of the class without its namespaces.
  std::string name() const override {
    const std::string qualified = torch::autograd::Node::name();
    return qualified.substr(qualified.rfind(':') + 1);
  }

  /// Called with the outputs of the forward pass after the node has become their history. A node that saves outputs
  /// declares a function of this name.
  template <typename... Outputs>
  void save_outputs(const Outputs&... /*outputs*/) {}

  variable_list apply(variable_list&& grads) final {
    const std::lock_guard<std::mutex> lock(mutex_);
    return derived().differentiate(grads);
  }

  void release_variables() final {
    const std::lock_guard<std::mutex> lock(mutex_);
    for_each_member([](auto& member) {
      if constexpr (kIsSaved<decltype(member)>) {
        member.reset_data();
      }
    });
  }

  /// Collects the inputs of a compiled graph and the values that it is specialised on.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const final {
    TORCH_CHECK_NOT_IMPLEMENTED(
        Derived::kCompiledAutograd, name(),
        ": expected a backward pass outside compiled autograd, which cannot trace this operator, got one inside: set "
        "torch._dynamo.config.compiled_autograd to False for this backward pass");
    const auto collect = [&args](auto& member) {
      if constexpr (kIsSaved<decltype(member)>) {
        args.collect(member, /*is_output=*/true);  // passes the node to unpack(); inputs ignore it
      } else {
        args.collect(std::as_const(member));
      }
    };
    const_cast<Node&>(*this).for_each_member(collect);  // NOLINT(cppcoreguidelines-pro-type-const-cast): is only read
    for (size_t i = 0; i < num_outputs(); ++i) {
      args.collect(wants(i));
    }
  }

  /// Records a call of `call_compiled` in the graph that is being compiled.
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& swap) final {
    namespace compiled = torch::dynamo::autograd;
    for_each_member([&swap](auto& member) { swap.before(member); });
    compiled::PackedArgs packed;
    for_each_member([&](auto& member) {
      if constexpr (kIsSaved<decltype(member)>) {
        packed.pack(unpack(member));
      } else {
        packed.pack(member);
      }
    });
    std::vector<bool> wanted;
    for (size_t i = 0; i < num_outputs(); ++i) {
      wanted.push_back(wants(i));
    }
    packed.pack(wanted);
    for_each_member([&swap](auto& member) { swap.after(member); });

    std::vector<at::TypePtr> schema;
    for (const at::IValue& argument : packed.vec()) {
      schema.push_back(argument.isTensor() ? at::TypePtr(at::TensorType::get()) : argument.type());
    }
    const auto& compiler = compiled::getPyCompilerInterface();
    const std::string function = compiler->bind_function(
        swap.get_py_compiler(), name(), call_compiled, std::move(schema), /*is_custom_function=*/true,
        /*is_traceable=*/true);
    using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
    return compiler->call_function(
        swap.get_py_compiler(), "apply_functional", function, grads, packed.vec(),
        compiled::IValuePacker<Metadata>::pack(compiled::get_input_metadata(next_edges())));
  }

 protected:
  /// Whether compiled autograd can trace the node. A node that it cannot trace declares this as `false`.
  static constexpr bool kCompiledAutograd = true;

  /// Whether the gradient of input `i`, or of one of inputs `begin` to `end - 1`, is needed.
  bool wants(size_t i) const { return wanted_.has_value() ? (*wanted_)[i] : task_should_compute_output(i); }
  bool wants(size_t begin, size_t end) const {
    for (size_t i = begin; i < end; ++i) {
      if (wants(i)) {
        return true;
      }
    }
    return false;
  }

  /// The saved tensor, an input or an output of the forward pass. Throws if it was modified since.
  at::Tensor unpack(const SavedVariable& saved) { return saved.unpack(getptr()); }

  /// The same for an argument that may be absent.
  std::optional<at::Tensor> unpack_optional(const SavedVariable& saved) { return optional_tensor(unpack(saved)); }

 private:
  template <typename T>
  static constexpr bool kIsSaved = std::is_same_v<std::decay_t<T>, SavedVariable>;

  template <typename T, typename = void>
  struct HasState : std::false_type {};
  template <typename T>
  struct HasState<T, std::void_t<decltype(std::declval<T&>().state())>> : std::true_type {};
  template <typename T>
  struct IsArray : std::false_type {};
  template <typename T, size_t N>
  struct IsArray<std::array<T, N>> : std::true_type {};

  Derived& derived() { return static_cast<Derived&>(*this); }

  /// Calls `visit` with each saved variable and each value of `member`, a part of the state.
  template <typename Member, typename Visit>
  static void visit_all(Member& member, const Visit& visit) {
    const auto visit_each = [&visit](auto&... members) { (visit_all(members, visit), ...); };
    if constexpr (HasState<Member>::value) {
      std::apply(visit_each, member.state());
    } else if constexpr (IsArray<Member>::value) {
      std::apply(visit_each, member);
    } else {
      visit(member);
    }
  }

  /// Calls `visit` with each saved variable and each value of the state.
  template <typename Visit>
  void for_each_member(const Visit& visit) {
    visit_all(derived(), visit);
  }

  /// The backward pass as a function of gradients and state only, by a new node that has this state.
  static variable_list call_compiled(const variable_list& grads, const std::vector<at::IValue>& arguments) {
    const at::AutoGradMode no_graph(false);  // compiled autograd refuses create_graph
    const NodePtr owner = new_node<Derived>();
    auto* const node = static_cast<Derived*>(owner.get());
    torch::dynamo::autograd::PackedArgs packed(arguments);
    const bool traced = at::SavedTensorDefaultHooks::set_tracing(true);  // no hooks: they have run
    node->for_each_member([&packed](auto& member) {
      using Member = std::decay_t<decltype(member)>;
      if constexpr (kIsSaved<Member>) {
        member = SavedVariable(packed.unpack<at::Tensor>(), /*is_output=*/false);
      } else {
        member = packed.unpack<Member>();
      }
    });
    at::SavedTensorDefaultHooks::set_tracing(traced);
    node->wanted_ = packed.unpack<std::vector<bool>>();
    return node->apply(variable_list(grads));
  }

  std::optional<std::vector<bool>> wanted_;  // set in nodes that call_compiled makes; others ask the engine
};

}  // namespace posenc::autograd
