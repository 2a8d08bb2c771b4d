#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace posenc {

/// Options for `alibi_attention`.
///
/// Example:
/// ```
/// posenc::ALiBiAttentionOptions().causal(true).scale(0.125)
/// ```
struct POSENC_API ALiBiAttentionOptions {
  /// Factor of the products of queries and keys, not of the bias. Default: `1 / sqrt(D)`.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  /// Hide the keys beyond the position of the query. Default: false.
  TORCH_ARG(bool, causal) = false;
  /// Key position of query 0, in every sequence of the batch. Default: the last query of a sequence sits at its last
  /// key.
  TORCH_ARG(std::optional<int64_t>, query_offset) = std::nullopt;
  /// Queries and keys of each sequence of a right-padded batch: int32 or int64 `[B]` on the device of q, 0 to Sq and
  /// 0 to Sk. Give both, or one with `query_offset`: where the last query sits must be known. What lies behind the
  /// lengths is not read and may be NaN: k, v and q are copied for that, with zeros there. Default: Sq and Sk.
  TORCH_ARG(std::optional<at::Tensor>, seqlens_q) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, seqlens_k) = std::nullopt;
  /// Where each of N sequences begins in packed q, and in packed k and v: int32 or int64 `[N + 1]` on the device of q,
  /// not descending, at most T. `cu_seqlens_k` defaults to `cu_seqlens_q`. Required for packed tensors.
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens_q) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens_k) = std::nullopt;
  /// At least the length of the longest packed sequence. Default on the CPU: that length; required on a GPU, where the
  /// host cannot see it without waiting. `max_seqlen_k` defaults to `max_seqlen_q` where `cu_seqlens_k` is left out.
  TORCH_ARG(std::optional<int64_t>, max_seqlen_q) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, max_seqlen_k) = std::nullopt;
};

/// Attention with linear biases (ALiBi, Press et al. 2021, https://arxiv.org/abs/2108.12409) without scores in memory:
///
///     out[b, i, h] = sum over j of softmax over j of (scale * q[b, i, h] . k[b, j, g] + bias[h, i, j]) * v[b, j, g]
///
/// with g = h / (Hq / Hk) and the bias of `posenc/alibi.h`. As the dispatcher operator `posenc::alibi_attention` it has
/// kernels for CPU, CUDA and Meta, and takes part in autocast as LibTorch's `scaled_dot_product_attention` does.
///
/// Memory grows with Sq + Sk, not with their product. Scores, softmax and sums are float32 (float64 for float64).
/// Gradients reach q, k, v and slopes, and can be differentiated again, in the same memory; from the third derivative
/// on with the scores in memory, and not under `torch.func`.
///
/// Packed sequences are computed as padded batches of sequences of similar length, so memory grows with the tokens. On
/// a CPU time grows with the sum of the squared lengths. On a GPU the host does not wait for the lengths: there, where
/// padding all sequences to the longest would take more than twice the tokens, time is that of at most four times the
/// tokens in sequences of `max_seqlen`.
///
/// NaN and infinity in keys and values that lengths hide reach no result and no gradient. Behind a causal mask they
/// reach no row that does not see them where attention is not fused; fused attention multiplies them with a
/// probability of 0 where they share a tile of keys with a visible key, and NaN is the result.
///
/// On GPUs of compute capability 9.0, float16 and bfloat16 heads of 32, 64, 80, 96, 128, 192 or 256 channels are one
/// fused kernel of cuDNN's; a gradient that flows through lse is not. Its plans are made at the first call for a shape:
/// make that call before a CUDA graph is captured, else the capture is an error. All else is computed in blocks of
/// matrix products, slower; on a GPU a warning says so once. Results are the same bits every time; gradients of q, k
/// and v through cuDNN where LibTorch's deterministic algorithms are on.
///
/// @param q  `[B, Sq, Hq, D]`, or packed sequences `[T, Hq, D]`: float16, bfloat16, float32 or float64, any strides.
/// @param k,v  `[B, Sk, Hk, D]` or `[Tk, Hk, D]`, of the dtype and device of q; Hq is a multiple of Hk (GQA, MQA).
/// @param slopes  `[Hq]` of any stride: float32, or float64 with float64 q. Stays float32 under autocast.
/// @return a tensor of the shape and dtype of q, in its memory layout where that is dense. Queries that see no key, or
///   lie behind the length of their sequence, give zeros and have zero gradients. A length beyond its tensor, which
///   the host cannot see on a GPU, gives NaN for that sequence; on the CPU it is an error.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
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

/// The same with the logarithm of each row's sum of exponentials, by which outputs over parts of the keys are merged:
/// `out = sum of exp(lse_i - lse) out_i` with `lse = logsumexp of lse_i`. Gradients flow through both.
///
/// @return `(out, lse)`; the second is `[B, Hq, Sq]`, or `[Hq, T]` for packed sequences, float32 (float64 for float64)
///   and minus infinity where a query sees no key.
POSENC_API std::tuple<at::Tensor, at::Tensor> alibi_attention_with_lse(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const ALiBiAttentionOptions& options = {});

}  // namespace posenc
