#pragma once

#include <arguments/alibi_attention.h>
#include <posenc/context_parallel_alibi_attention.h>

// What `context_parallel_alibi_attention` and its backward pass accept of one rank.
namespace posenc::arguments {

/// Checks a call of `context_parallel_alibi_attention` among `world_size` ranks.
/// @return the call that would be made of the tensors of this rank alone.
/// @throws c10::Error  naming the argument, what was expected and what came; as all functions here.
AlibiAttention check_context_parallel_attention(
    const char* op,
    const AttentionTensors& inputs,
    const ContextParallelALiBiAttentionOptions& options,
    int64_t world_size);

/// Checks a call of `context_parallel_alibi_attention_backward`. `slopes_grad` is not read.
AlibiAttention check_context_parallel_attention_backward(
    const char* op,
    const AttentionBackwardArguments& arguments,
    const ContextParallelALiBiAttentionOptions& options,
    int64_t world_size);

}  // namespace posenc::arguments
