#pragma once

#include <arguments/alibi_attention.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

// Checks of `context_parallel_alibi_attention` and its backward pass, on the tensors of one rank.
namespace posenc::arguments {

/// The options as they pass through the dispatcher.
struct ContextParallelOptions {
  std::string group_name;
  std::optional<double> scale;
  bool causal = false;

  auto flat() const { return std::tie(group_name, scale, causal); }
};

/// Checks a call among `world_size` ranks. `arguments` are the tensors of the forward or of the backward operator.
/// @return the attention call on the tensors of this rank alone.
/// @throws c10::Error  naming the argument, what was expected and what was given. The functions below throw the same.
AlibiAttention check_context_parallel_attention(
    const char* op,
    const AttentionTensors& arguments,
    const ContextParallelOptions& options,
    int64_t world_size);
AlibiAttention check_context_parallel_attention_backward(
    const char* op,
    const AttentionBackwardArguments& arguments,
    const ContextParallelOptions& options,
    int64_t world_size);

}  // namespace posenc::arguments
