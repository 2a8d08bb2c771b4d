#pragma once

#include <posenc/context_parallel_attention.h>
#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <string>

namespace posenc {

/// Options for `context_parallel_alibi_attention`, whose `slopes` are an argument: they must not be set in the options.
using ContextParallelALiBiAttentionOptions = ContextParallelAttentionOptions;

/// `posenc::context_parallel_attention` with these slopes.
///
/// @param slopes  as in `ContextParallelAttentionOptions`, required.
///
/// Example:
/// ```
/// at::Tensor out = posenc::context_parallel_alibi_attention(
///     q, k, v, slopes, group, posenc::ContextParallelALiBiAttentionOptions().causal(true));
/// ```
POSENC_API at::Tensor context_parallel_alibi_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ContextParallelALiBiAttentionOptions& options = {});
POSENC_API at::Tensor context_parallel_alibi_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const std::string& group_name,
    const ContextParallelALiBiAttentionOptions& options = {});

}  // namespace posenc
