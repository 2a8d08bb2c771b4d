#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <tuple>

/// Query-key normalisation fused with the rotary embedding, as a dispatcher operator
/// (`posenc::qk_norm_rotary_embedding`) with kernels for CPU, CUDA and Meta, and derivatives of any order.
namespace posenc {

/// RMSNorm over each head of `q` with `q_weight` and of `k` with `k_weight` (Henry et al. 2020,
/// https://arxiv.org/abs/2010.04245, in the form of Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4),
/// then the rotation of `rotary_embedding_qk`. For a head x with weight w,
///
///     z = x / sqrt(mean(x^2) + eps) * w,    y = z with its first R = 2 * cos.size(-1) channels rotated.
///
/// float16 and bfloat16 are computed in float32 and rounded once, at the end. Tensor operations also round after the
/// normalisation and after the weight. The forward pass reads and writes `q` and `k` once and saves its arguments only.
/// The backward pass reads them and their gradients once, and computes the norms again.
///
/// A NaN in one head of one token makes this head NaN. An infinity makes its pair NaN and the rest of the head zero,
/// as in tensor operations. One in a weight or in a table affects its pair in all tokens that read it.
///
/// @param q,k  `[B, S, Hq, D]` and `[B, S, Hk, D]`, or `[T, Hq, D]` and `[T, Hk, D]` for packed sequences: float16,
///   bfloat16, float32 or float64, any strides (also 0) without a copy. On CUDA D is at most 4096 channels. It is
///   fastest if R is a multiple of 32 bytes, D a multiple of 16 bytes and D at most 1024 bytes. Squares are summed in
///   float32 (float64 for float64): heads with values beyond about 1e19 / sqrt(D), which only bfloat16 and float32 can
///   hold, give zeros, as in tensor operations.
/// @param q_weight,k_weight  `[D]`, both of the dtype of `q`, or both float32 (float64 for float64). Any stride.
/// @param cos,sin,positions,interleaved,pair_axes  as in `rotary_embedding_qk`. A position outside the tables gives NaN
///   for its token (with `pair_axes`, for the pairs that read it) and in the gradients of the weights of these
///   channels. The gradients of the heads of its token are NaN in all channels, also with `pair_axes`.
/// @param eps  positive. Default: 1e-6.
/// @param unit_offset  true: the weight is `1 + w` (Gemma 3) instead of `w` (Qwen3). Default: false.
/// @param conjugate  rotate by the negative angles. Default: false.
/// @return `(q', k')`, new tensors of the shapes and dtype of `q` and `k`, in their memory layout if that is dense.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// Differentiable with respect to `q`, `k`, the weights, `cos` and `sin`, any number of times; deterministic. Gradients
/// of `cos` and `sin`, and second derivatives, are computed by tensor operations and the rotary operators.
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
