#pragma once

#include <posenc/context_parallel_alibi_attention.h>

#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <array>
#include <optional>
#include <tuple>

// Attention with linear biases over the keys of all ranks of a group.
namespace posenc::context_parallel {

/// `context_parallel_alibi_attention_with_lse` of a checked group.
std::tuple<at::Tensor, at::Tensor> alibi_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ContextParallelALiBiAttentionOptions& options);

/// `context_parallel_alibi_attention_backward` of a checked group.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> alibi_attention_backward(
    const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& out,
    const at::Tensor& lse,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ContextParallelALiBiAttentionOptions& options,
    std::array<bool, 4> grad_mask);

}  // namespace posenc::context_parallel
