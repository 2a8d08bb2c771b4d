#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/functorch/BatchedFallback.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

// vmap as a loop over the batch. LibTorch's fallbacks accept neither lists of tensors nor undefined results.
//
// `Level` is one level of a vmap: `Level(arguments)` finds it, `unwrapped(tensor)` is the tensor with its batch
// dimension first, nullopt if it has none at this level, and `wrapped` undoes that.
namespace posenc::functorch {

using at::IValue;
using at::Tensor;

/// The arguments of one call under vmap: each tensor with its batch dimension first, if it has one.
class BatchedArguments {
 public:
  template <typename Level>
  BatchedArguments(c10::ArrayRef<IValue> arguments, const Level& level) {
    for (const IValue& argument : arguments) {
      Argument& added = arguments_.emplace_back();
      added.value = argument;
      if (argument.isTensor()) {
        added.tensors.push_back(batch_first(argument.toTensor(), level));
      } else if (argument.isTensorList()) {
        for (const Tensor& tensor : argument.toTensorVector()) {
          added.tensors.push_back(batch_first(tensor, level));
        }
      }
    }
  }

  /// Length of the batch dimension; nullopt where no tensor has one.
  std::optional<int64_t> batch_size() const { return batch_size_; }

  bool batched(size_t argument) const {
    const std::vector<BatchFirst>& tensors = arguments_[argument].tensors;
    return std::any_of(tensors.begin(), tensors.end(), [](const BatchFirst& tensor) { return tensor.batched; });
  }

  /// The arguments of the operator for element `index` of the batch, as views; zeros if the batch is empty.
  torch::jit::Stack element(int64_t index) const {
    const auto of = [&](const BatchFirst& tensor) {
      if (!tensor.batched) {
        return tensor.value;
      }
      return *batch_size_ == 0 ? tensor.value.new_zeros_symint(tensor.value.sym_sizes().slice(1))
                               : tensor.value.select(0, index);
    };
    torch::jit::Stack stack;
    for (const Argument& argument : arguments_) {
      if (argument.value.isTensor()) {
        stack.emplace_back(of(argument.tensors[0]));
      } else if (argument.value.isTensorList()) {
        c10::List<Tensor> list;
        for (const BatchFirst& tensor : argument.tensors) {
          list.push_back(of(tensor));
        }
        stack.emplace_back(std::move(list));
      } else {
        stack.push_back(argument.value);
      }
    }
    return stack;
  }

 private:
  struct BatchFirst {
    Tensor value;
    bool batched;
  };
  struct Argument {
    IValue value;
    std::vector<BatchFirst> tensors;
  };

  template <typename Level>
  BatchFirst batch_first(const Tensor& tensor, const Level& level) {
    std::optional<Tensor> value = level.unwrapped(tensor);
    if (!value.has_value()) {
      return {tensor, false};
    }
    batch_size_ = value->size(0);
    return {std::move(*value), true};
  }

  std::vector<Argument> arguments_;
  std::optional<int64_t> batch_size_;
};

/// One result of the operator for all elements of the batch in one tensor; undefined if the operator returns none.
template <typename Level>
Tensor joined(const std::vector<Tensor>& elements, int64_t batch_size, const Level& level) {
  if (!elements[0].defined()) {
    return {};
  }
  return level.wrapped(at::stack(elements).narrow(0, 0, batch_size));
}

inline void check_written_arguments(const c10::OperatorHandle& op, const BatchedArguments& arguments) {
  for (size_t i = 0; i < op.schema().arguments().size(); ++i) {
    const c10::Argument& argument = op.schema().arguments()[i];
    TORCH_CHECK(
        argument.alias_info() == nullptr || arguments.batched(i), op.operator_name().name, ": expected ",
        argument.name(),
        ", which changes in place, to be batched by vmap like the other arguments, got one tensor for the whole batch: "
        "call the operator that works out of place");
  }
}

/// Calls the operator for each element of the batch, and stacks the results.
template <typename Level>
void loop_over_batch(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t num_arguments = op.schema().arguments().size();
  const Level level(torch::jit::last(*stack, num_arguments));
  const BatchedArguments arguments(torch::jit::last(*stack, num_arguments), level);
  if (!arguments.batch_size().has_value()) {
    op.callBoxed(stack);
    return;
  }
  if (at::functorch::isVmapFallbackWarningEnabled()) {
    TORCH_WARN(
        "There is a performance drop because ", op.operator_name().name,
        " has no batching rule: vmap calls it once for each element of the batch. Give it the batch as a dimension of "
        "its arguments where that is possible.");
  }
  check_written_arguments(op, arguments);
  torch::jit::drop(*stack, num_arguments);

  const int64_t batch_size = *arguments.batch_size();
  const size_t num_results = op.schema().returns().size();
  std::vector<torch::jit::Stack> results;  // one for each element
  for (int64_t i = 0; i < std::max<int64_t>(batch_size, 1); ++i) {
    results.push_back(arguments.element(i));
    op.callBoxed(&results.back());
  }
  for (size_t r = 0; r < num_results; ++r) {
    // A tensor is treated as a list of one.
    std::vector<std::vector<Tensor>> elements;
    for (const torch::jit::Stack& result : results) {
      const std::vector<Tensor> tensors =
          result[r].isTensorList() ? result[r].toTensorVector() : std::vector<Tensor>{result[r].toTensor()};
      elements.resize(tensors.size());
      for (size_t i = 0; i < tensors.size(); ++i) {
        elements[i].push_back(tensors[i]);
      }
    }
    c10::List<Tensor> list;
    for (const std::vector<Tensor>& tensor : elements) {
      list.push_back(joined(tensor, batch_size, level));
    }
    stack->emplace_back(results[0][r].isTensorList() ? IValue(std::move(list)) : IValue(list.get(0)));
  }
}

template <typename Level>
void implement(torch::Library& m) {
  for (const char* op :
       {"rotary_embedding",
        "rotary_embedding_",
        "rotary_embedding_qk",
        "rotary_embedding_qk_",
        "rotary_embedding_qkv",
        "rotary_embedding_pack",
        "rotary_embedding_backward",
        "rotary_embedding_tables_backward",
        "rotary_tables",
        "rotary_tables_backward",
        "qk_norm_rotary_embedding",
        "qk_norm_rotary_embedding_backward",
        "alibi_bias",
        "alibi_add",
        "alibi_add_",
        "alibi_mask",
        "alibi_slopes_backward",
        "alibi_softmax",
        "alibi_softmax_backward",
        "alibi_attention",
        "alibi_attention_backward",
        "alibi_attention_double_backward",
        "alibi_attention_slope_sums"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&loop_over_batch<Level>>());
  }
}

}  // namespace posenc::functorch
