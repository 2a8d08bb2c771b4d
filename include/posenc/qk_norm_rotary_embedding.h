#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <tuple>

/// Query-key normalisation fused with the rotary embedding, as a dispatcher operator
/// (`posenc::qk_norm_rotary_embedding`) with kernels for CPU, CUDA and Meta, and derivatives of any order.
namespace posenc {

/// RMSNorm over each head of `q` and of `k` with weights of their own (Henry et al. 2020,
/// https://arxiv.org/abs/2010.04245, in the form of Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4),
/// then the rotation of `rotary_embedding_qk`. With x one head and w its weight,
///
///     z = x / sqrt(mean(x^2) + eps) * w,    y = z with its first R = 2 * cos.size(-1) channels rotated.
///
/// Narrow dtypes are computed in float32 from end to end and rounded once; models in tensor operations round between
/// the normalisation, the weight and the rotation as well. The forward pass reads and writes `q` and `k` once and saves
/// nothing of its own; the backward pass reads them and their gradients once, and computes the norms again.
///
/// A NaN in one head of one token makes this head NaN. An infinity makes its pair NaN and the rest of the head zero,
/// as in tensor operations. One in a weight or in a table reaches its pair of the tokens that read it.
///
/// @param q,k  `[B, S, Hq, D]` and `[B, S, Hk, D]`, or `[T, Hq, D]` and `[T, Hk, D]` for packed sequences: float16,
///   bfloat16, float32 or float64, any strides (also 0) without a copy. On CUDA D is at most 4096, and fastest where D
///   and R are multiples of 32 bytes and of twice that, and D at most 1024 bytes. Squares are summed in float32
///   (float64 for float64): heads with values beyond about 1e19 / sqrt(D), which only bfloat16 and float32 can hold,
///   give zeros, as they do in tensor operations.
/// @param q_weight,k_weight  `[D]`, of one dtype: that of `q`, or float32 (float64 for float64). Any stride.
/// @param cos,sin,positions,interleaved,pair_axes  as in `rotary_embedding_qk`. What a position outside the tables
///   makes NaN, its token or its pairs, makes the gradients of its weights NaN, and with `pair_axes` that of its head.
/// @param eps  positive. Default: 1e-6.
/// @param unit_offset  the weight is `1 + w` (Gemma 3) instead of `w` (Qwen3). Default: false.
/// @param conjugate  rotate backwards. Default: false.
/// @return `(q', k')`, new tensors of the shapes and the dtype of `q` and `k`, in their memory layout where that is
///   dense.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// Differentiable with respect to `q`, `k`, the weights, `cos` and `sin`, any number of times; deterministic. Gradients
/// of `cos` and `sin`, and second derivatives, are made of tensor operations and the rotary operators.
///
/// Example:
/// ```
/// auto q_weight = torch::ones({128}, q.options().requires_grad(true));
/// auto k_weight = torch::ones({128}, k.options().requires_grad(true));
/// auto [q_out, k_out] = posenc::qk_norm_rotary_embedding(q, k, q_weight, k_weight, cos, sin);
/// ```
POSENC_API std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_embedding(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& q_weight,
    const at::Tensor& k_weight,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    double eps = 1e-6,
    bool unit_offset = false,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

}  // namespace posenc
