#include <autograd/detail/attention_node.h>
#include <ops/alibi_attention.h>
#include <ops/dispatch.h>
#include <posenc/reference.h>

#include <ATen/ops/alias.h>
#include <torch/library.h>

#include <array>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
using autograd::AttentionInputs;
using autograd::optional_tensor;
using autograd::or_undefined;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The options of a call, with its tensors as saved variables: autograd notices if lengths are modified before the
/// backward pass.
class SavedOptions {
 public:
  SavedOptions() = default;
  explicit SavedOptions(const SymbolicAttentionOptions& options) : options_(options) {
    size_t i = 0;
    for (std::optional<Tensor>* tensor : tensors(options_)) {
      lengths_[i++] = SavedVariable(or_undefined(*tensor), /*is_output=*/false);
      tensor->reset();
    }
  }

  auto state() {
    return std::tie(
        options_.scale, options_.causal, options_.query_offset, options_.max_seqlen_q, options_.max_seqlen_k,
        options_.window_left, options_.window_right, options_.softcap, lengths_);
  }

  SymbolicAttentionOptions unpack() const {
    SymbolicAttentionOptions result = options_;
    size_t i = 0;
    for (std::optional<Tensor>* tensor : tensors(result)) {
      *tensor = optional_tensor(lengths_[i++].unpack());
    }
    return result;
  }

 private:
  static std::array<std::optional<Tensor>*, 4> tensors(SymbolicAttentionOptions& o) {
    return {&o.seqlens_q, &o.seqlens_k, &o.cu_seqlens_q, &o.cu_seqlens_k};
  }

  SymbolicAttentionOptions options_;  // without their tensors
  std::array<SavedVariable, 4> lengths_;
};

// ---------------------------------------------------------------------------------------------------------------------
// First derivative

class AlibiAttentionBackward final : public autograd::AttentionNode<AlibiAttentionBackward> {
 public:
  AlibiAttentionBackward() = default;
  AlibiAttentionBackward(const AttentionInputs& inputs, const SymbolicAttentionOptions& options)
      : AttentionNode(inputs), options_(options) {}

  std::string name() const override { return "AlibiAttentionBackward"; }

  auto state() { return std::tuple_cat(attention_state(), options_.state()); }

  variable_list gradients(const AttentionInputs& inputs, const variable_list& grads) {
    const auto& [q, k, v, slopes] = inputs;
    const Tensor result = out();
    auto [grad_q, grad_k, grad_v, grad_slopes] = dispatch::alibi_attention_backward(
        options_.unpack(),
        {or_zeros(grads[0], result), optional_tensor(grads[1]), q, k, v, optional_tensor(slopes), result, lse()},
        /*slopes_grad=*/wants(3));
    return {grad_q, grad_k, grad_v, grad_slopes};
  }

 private:
  SavedOptions options_;
};

std::tuple<Tensor, Tensor> alibi_attention_autograd(
    const SymbolicAttentionOptions& options,
    const AttentionTensors& inputs) {
  return autograd::record_attention<AlibiAttentionBackward>(
      "posenc::alibi_attention", {inputs.q, inputs.k, inputs.v, or_undefined(inputs.slopes)},
      [&] { return dispatch::alibi_attention(options, inputs); }, options);
}

// ---------------------------------------------------------------------------------------------------------------------
// Second and third derivative

/// The inputs of the backward pass: grad_out, grad_lse, q, k, v and slopes. Absent ones are undefined.
using BackwardInputs = std::array<Tensor, 6>;

/// The tensors as saved variables.
template <size_t N>
std::array<SavedVariable, N> saved(const std::array<Tensor, N>& tensors) {
  std::array<SavedVariable, N> result;
  for (size_t i = 0; i < N; ++i) {
    result[i] = SavedVariable(tensors[i], /*is_output=*/false);
  }
  return result;
}

class AlibiAttentionDoubleBackward final : public autograd::Node<AlibiAttentionDoubleBackward> {
 public:
  AlibiAttentionDoubleBackward() = default;
  AlibiAttentionDoubleBackward(const BackwardInputs& inputs, const SymbolicAttentionOptions& options)
      : inputs_(saved(inputs)), options_(options) {}

  std::string name() const override { return "AlibiAttentionDoubleBackward"; }

  auto state() { return std::tuple_cat(std::tie(inputs_), options_.state()); }

  variable_list differentiate(const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& grad) { return grad.defined(); })) {
      return variable_list(inputs_.size());
    }
    auto [grad_out, grad_lse, q, k, v, slopes] = dispatch::alibi_attention_double_backward(
        options_.unpack(),
        {optional_tensor(grads[0]), optional_tensor(grads[1]), optional_tensor(grads[2]), optional_tensor(grads[3]),
         unpack(inputs_[0]), unpack_optional(inputs_[1]), unpack(inputs_[2]), unpack(inputs_[3]), unpack(inputs_[4]),
         unpack_optional(inputs_[5])});
    return {grad_out, grad_lse, q, k, v, slopes};
  }

 private:
  std::array<SavedVariable, std::tuple_size_v<BackwardInputs>> inputs_;
  SavedOptions options_;
};

/// The inputs of the second derivative: the gradients of dq, dk, dv and dslopes, then the inputs of the backward pass.
using DoubleBackwardInputs = std::array<Tensor, 10>;

/// The third and higher derivatives, those of the reference version, with the scores in memory.
class AlibiAttentionTripleBackward final : public autograd::Node<AlibiAttentionTripleBackward> {
 public:
  AlibiAttentionTripleBackward() = default;
  AlibiAttentionTripleBackward(const DoubleBackwardInputs& inputs, const SymbolicAttentionOptions& options)
      : inputs_(saved(inputs)), options_(options) {}

  std::string name() const override { return "AlibiAttentionTripleBackward"; }

  auto state() { return std::tuple_cat(std::tie(inputs_), options_.state()); }

  static constexpr bool kCompiledAutograd = false;  // it builds a graph of its own

  variable_list differentiate(const variable_list& grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const bool create_graph = at::GradMode::is_enabled();
    const at::AutoGradMode record(true);
    // Aliases: without them an input that is the same tensor as another one, or depends on it, would get both
    // gradients.
    variable_list inputs;
    for (const SavedVariable& input : inputs_) {
      Tensor x = unpack(input);
      if (x.defined()) {
        x = create_graph ? at::alias(x) : x.detach();
        x = x.requires_grad() ? x : x.detach().requires_grad_();
      }
      inputs.push_back(std::move(x));
    }
    const variable_list results = double_backward(inputs);
    return defined_gradients(results, inputs, grads, create_graph);
  }

 private:
  /// The second derivative in differentiable tensor operations.
  variable_list double_backward(const variable_list& inputs) {
    const variable_list arguments(inputs.begin() + 6, inputs.end());
    const SymbolicAttentionOptions o = options_.unpack();
    AttentionOptions options;
    const auto guarded = [](const std::optional<c10::SymInt>& x) {
      return x.has_value() ? std::optional<int64_t>(x->guard_int(__FILE__, __LINE__)) : std::nullopt;
    };
    options.slopes(optional_tensor(arguments[3])).scale(o.scale).causal(o.causal).query_offset(guarded(o.query_offset));
    options.window(guarded(o.window_left), guarded(o.window_right)).softcap(o.softcap);
    options.seqlens_q(o.seqlens_q).seqlens_k(o.seqlens_k).cu_seqlens_q(o.cu_seqlens_q).cu_seqlens_k(o.cu_seqlens_k);
    const auto [out, lse] = reference::attention(arguments[0], arguments[1], arguments[2], options);
    const variable_list first = defined_gradients({out, lse}, arguments, {inputs[4], inputs[5]}, /*create_graph=*/true);
    const variable_list of(inputs.begin() + 4, inputs.end());
    return defined_gradients(first, of, variable_list(inputs.begin(), inputs.begin() + 4), /*create_graph=*/true);
  }

  /// `torch::autograd::grad`, with zero for undefined gradients and arguments.
  static variable_list defined_gradients(
      const variable_list& results,
      const variable_list& arguments,
      const variable_list& grads,
      bool create_graph) {
    variable_list roots;
    variable_list of_roots;
    for (size_t i = 0; i < results.size(); ++i) {
      if (grads[i].defined() && results[i].defined() && results[i].requires_grad()) {
        roots.push_back(results[i]);
        of_roots.push_back(grads[i].to(results[i].scalar_type()));
      }
    }
    variable_list wanted;
    for (const Tensor& argument : arguments) {
      if (argument.defined()) {
        wanted.push_back(argument);
      }
    }
    variable_list result(arguments.size());
    if (roots.empty()) {
      return result;
    }
    const variable_list found =
        torch::autograd::grad(roots, wanted, of_roots, /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
    size_t next = 0;
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (arguments[i].defined()) {
        result[i] = found[next++];
      }
    }
    return result;
  }

  std::array<SavedVariable, std::tuple_size_v<DoubleBackwardInputs>> inputs_;
  SavedOptions options_;
};

AttentionGradients alibi_attention_backward_autograd(
    const SymbolicAttentionOptions& options,
    const AttentionBackwardArguments& a,
    bool slopes_grad) {
  const BackwardInputs inputs{a.grad_out, or_undefined(a.grad_lse), a.q, a.k, a.v, or_undefined(a.slopes)};
  autograd::check_no_tangents("posenc::alibi_attention_backward", inputs);
  auto result = autograd::below_autograd([&] { return dispatch::alibi_attention_backward(options, a, slopes_grad); });
  const auto& [grad_q, grad_k, grad_v, grad_slopes] = result;
  autograd::record<AlibiAttentionDoubleBackward>(inputs, {grad_q, grad_k, grad_v, grad_slopes}, inputs, options);
  return result;
}

AttentionSecondGradients alibi_attention_double_backward_autograd(
    const SymbolicAttentionOptions& options,
    const AttentionDoubleBackwardArguments& a) {
  const DoubleBackwardInputs inputs{
      or_undefined(a.grad_grad_q),
      or_undefined(a.grad_grad_k),
      or_undefined(a.grad_grad_v),
      or_undefined(a.grad_grad_slopes),
      a.grad_out,
      or_undefined(a.grad_lse),
      a.q,
      a.k,
      a.v,
      or_undefined(a.slopes)};
  autograd::check_no_tangents("posenc::alibi_attention_double_backward", inputs);
  auto result = autograd::below_autograd([&] { return dispatch::alibi_attention_double_backward(options, a); });
  const auto& [grad_out, grad_lse, q, k, v, slopes] = result;
  autograd::record<AlibiAttentionTripleBackward>(inputs, {grad_out, grad_lse, q, k, v, slopes}, inputs, options);
  return result;
}

Tensor alibi_attention_slope_sums_autograd(
    const SymbolicAttentionOptions& options,
    const AttentionSlopeSumsArguments& a) {
  autograd::check_no_gradients(
      "posenc::alibi_attention_slope_sums",
      std::array<Tensor, 6>{a.grad_out, a.q, a.k, a.v, or_undefined(a.slopes), a.lse},
      "differentiate alibi_attention with create_graph");
  return autograd::below_autograd([&] { return dispatch::alibi_attention_slope_sums(options, a); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("alibi_attention", kernel<alibi_attention_autograd>);
  m.impl("alibi_attention_backward", kernel<alibi_attention_backward_autograd>);
  m.impl("alibi_attention_double_backward", kernel<alibi_attention_double_backward_autograd>);
  m.impl("alibi_attention_slope_sums", kernel<alibi_attention_slope_sums_autograd>);
}

}  // namespace posenc
