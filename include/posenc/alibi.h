#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

/// Attention with linear biases (ALiBi, Press et al. 2021, https://arxiv.org/abs/2108.12409) as dispatcher
/// operators: `posenc::alibi_bias`, `alibi_add`, `alibi_add_` and `alibi_softmax`. They have kernels for CPU, CUDA and
/// Meta, and derivatives of any order.
///
/// Query i is at key position `query_offset + i`, and the bias of key j is
///
///     bias[h, i, j] = -slopes[h] * |query_offset + i - j|.
///
/// The default of `query_offset` is `k_len - q_len`: the last query is at the last key, as in decoding. Distances are
/// integers. Products and sums are float32 (float64 for float64 scores) and rounded once to the dtype of the result.
/// With `causal`, keys beyond the position of the query are minus infinity.
///
/// In all operators `slopes` is `[H]` of any stride: float32, or float64 if the scores or the result are float64. The
/// gradient of the slopes is deterministic.
namespace posenc {

/// The published slopes: for `n = 2^k` heads `2^(-max_bias (h + 1) / n)`. For other numbers of heads: the slopes of the
/// power of two below, followed by every other slope of the power of two above, not sorted. Computed in float64.
///
/// @param num_heads  H: positive. With tensor parallelism take the slice of the whole model's slopes.
/// @param max_bias  8 in the paper; positive.
/// @return float32 `[H]` on the CPU.
///
/// Example:
/// ```
/// at::Tensor slopes = posenc::alibi_slopes(/*num_heads=*/12).to(at::kCUDA);
/// ```
POSENC_API at::Tensor alibi_slopes(int64_t num_heads, double max_bias = 8.0);

/// The bias as a tensor. `alibi_add` and `alibi_softmax` compute the bias without storing it.
///
/// @param q_len,k_len  Sq and Sk: number of queries and of keys, not negative.
/// @param causal  minus infinity for keys beyond the position of the query.
/// @param dtype  float16, bfloat16, float32 or float64.
/// @param query_offset  position of query 0; default `k_len - q_len`.
/// @return `[H, Sq, Sk]`, contiguous, on the device of `slopes`.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// Example:
/// ```
/// at::Tensor bias = posenc::alibi_bias(slopes, 2048, 2048);  // [H, 2048, 2048]
/// ```
POSENC_API at::Tensor alibi_bias(
    const at::Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal = false,
    at::ScalarType dtype = at::kFloat,
    std::optional<int64_t> query_offset = std::nullopt);

/// `scores + bias` in one pass.
///
/// @param scores  `[B, H, Sq, Sk]` or `[H, Sq, Sk]`: float16, bfloat16, float32 or float64, any strides (also 0)
///   without a copy; dense keys are fastest.
/// @return a new tensor of the shape and dtype of `scores`, in its memory layout if that is dense.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// The gradient of `scores` is the incoming gradient, without a kernel or a copy; with `causal` it is zero for hidden
/// keys.
///
/// Example:
/// ```
/// at::Tensor biased = posenc::alibi_add(at::matmul(q, k.transpose(-1, -2)), slopes, /*causal=*/true);
/// ```
POSENC_API at::Tensor alibi_add(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    bool causal = false,
    std::optional<int64_t> query_offset = std::nullopt);

/// `alibi_add` in place.
///
/// @param scores  as in `alibi_add`; neither a leaf that requires grad nor a tensor whose elements share memory.
/// @return `scores`.
POSENC_API at::Tensor& alibi_add_(
    at::Tensor& scores,
    const at::Tensor& slopes,
    bool causal = false,
    std::optional<int64_t> query_offset = std::nullopt);

/// `softmax(scale * scores + bias + mask)` over the keys, in one pass; arguments as in `alibi_add`.
///
/// @param scale  factor of the scores, not of the bias.
/// @param key_padding_mask  `[B, Sk]` bool on the device of `scores`, true where a key is hidden; B is 1 for scores
///   of three dimensions.
/// @return probabilities of the shape and dtype of `scores`, in its memory layout if that is dense. A row without a
///   visible key is zero, and so are its gradients.
///
/// Only the result is saved for the backward pass. In float16 and bfloat16 the gradient of the slopes is therefore
/// computed from rounded probabilities: its error is below 1 % of the square root of the sum of its squared terms. This
/// is more than 1 % of the gradient if the terms nearly cancel.
///
/// Example:
/// ```
/// at::Tensor p = posenc::alibi_softmax(scores, slopes, 1 / std::sqrt(head_dim), /*causal=*/true, padding);
/// ```
POSENC_API at::Tensor alibi_softmax(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    double scale = 1.0,
    bool causal = false,
    const std::optional<at::Tensor>& key_padding_mask = std::nullopt,
    std::optional<int64_t> query_offset = std::nullopt);

}  // namespace posenc
