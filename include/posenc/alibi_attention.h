#pragma once

#include <posenc/attention.h>
#include <posenc/export.h>

#include <ATen/core/Tensor.h>

#include <tuple>

namespace posenc {

/// Options for `alibi_attention`, whose `slopes` are an argument: they must not be set in the options.
using ALiBiAttentionOptions = AttentionOptions;

/// Attention with linear biases (ALiBi, Press et al. 2021, https://arxiv.org/abs/2108.12409): `posenc::attention` with
/// these slopes.
///
/// @param slopes  as in `AttentionOptions`, required.
///
/// Example:
/// ```
/// at::Tensor slopes = posenc::alibi_slopes(/*num_heads=*/32).to(q.device());
/// at::Tensor out = posenc::alibi_attention(q, k, v, slopes, posenc::ALiBiAttentionOptions().causal(true));
/// ```
POSENC_API at::Tensor alibi_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const ALiBiAttentionOptions& options = {});

/// `posenc::attention_with_lse` with these slopes.
POSENC_API std::tuple<at::Tensor, at::Tensor> alibi_attention_with_lse(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const ALiBiAttentionOptions& options = {});

}  // namespace posenc
