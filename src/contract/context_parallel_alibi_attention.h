#pragma once

#include <contract/alibi_attention.h>
#include <posenc/context_parallel_alibi_attention.h>

// What `context_parallel_alibi_attention` and its backward pass accept of one rank.
namespace posenc::contract {

/// Checks a call of `context_parallel_alibi_attention` among `world_size` ranks.
/// @return the call that would be made of the tensors of this rank alone.
/// @throws c10::Error  naming the argument, what was expected and what came; as all functions here.
AlibiAttention context_parallel_alibi_attention(
    const char* op,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const ContextParallelALiBiAttentionOptions& options,
    int64_t world_size);

/// Checks a call of `context_parallel_alibi_attention_backward`.
AlibiAttention context_parallel_alibi_attention_backward(
    const char* op,
    const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& out,
    const at::Tensor& lse,
    const ContextParallelALiBiAttentionOptions& options,
    int64_t world_size);

}  // namespace posenc::contract
