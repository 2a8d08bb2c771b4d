#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace posenc {

/// Options for `attention`.
///
/// Example:
/// ```
/// posenc::AttentionOptions().causal(true).scale(0.125)
/// ```
struct POSENC_API AttentionOptions {
  /// Slopes of linear biases (ALiBi, `posenc/alibi.h`) of any strides: `[Hq]`, or one row for each sequence, `[B, Hq]`
  /// (packed: `[N, Hq]`). float32, or float64 with float64 q. They stay float32 under autocast. Default: no bias.
  TORCH_ARG(std::optional<at::Tensor>, slopes) = std::nullopt;
  /// Factor of the products of queries and keys, not of the bias. Default: `1 / sqrt(D)`.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  /// Whether to hide the keys beyond the position of the query. Default: false.
  TORCH_ARG(bool, causal) = false;
  /// Key position of query 0, in every sequence of the batch. Default: the last query of a sequence is at its last key.
  /// Positions matter for the bias, the causal mask and the window.
  TORCH_ARG(std::optional<int64_t>, query_offset) = std::nullopt;
  /// Numbers of queries and keys of each sequence of a right-padded batch: int32 or int64 `[B]` on the device of q, 0
  /// to Sq and 0 to Sk. Set both, or one and `query_offset`, whose default is the difference of both lengths. Values
  /// past the lengths may be NaN. Default: Sq and Sk.
  TORCH_ARG(std::optional<at::Tensor>, seqlens_q) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, seqlens_k) = std::nullopt;
  /// The first token of each of N sequences in packed q, and in packed k and v, and the end of the last one: int32 or
  /// int64 `[N + 1]` on the device of q, not descending, at most T. Required for packed tensors; `cu_seqlens_k`
  /// defaults to `cu_seqlens_q`.
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens_q) = std::nullopt;
  TORCH_ARG(std::optional<at::Tensor>, cu_seqlens_k) = std::nullopt;
  /// At least the length of the longest packed sequence. Default on the CPU: that length. Required on a GPU, where the
  /// host cannot read the lengths without waiting. `max_seqlen_k` defaults to `max_seqlen_q` if `cu_seqlens_k` is not
  /// set.
  TORCH_ARG(std::optional<int64_t>, max_seqlen_q) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, max_seqlen_k) = std::nullopt;
  /// Sliding window: a query at key position p sees keys `p - window_left` to `p + window_right`, or with `causal` to
  /// p. Not negative. Keys that no query of a block of rows sees take no time. Default: not limited.
  TORCH_ARG(std::optional<int64_t>, window_left) = std::nullopt;
  TORCH_ARG(std::optional<int64_t>, window_right) = std::nullopt;
  /// A positive number c: each product of a query and a key times `scale`, s, becomes `c * tanh(s / c)`, before bias
  /// and mask (Gemma 2, https://arxiv.org/abs/2408.00118, section 2). Default: s.
  TORCH_ARG(std::optional<double>, softcap) = std::nullopt;
  /// Attention sinks: a logit for each head whose exponential is added to the sum of the softmax, without a value
  /// (gpt-oss, https://arxiv.org/abs/2508.10925; Miller 2023, "Attention is off by one"). `[Hq]`: float32, or float64
  /// with float64 q. They have gradients of any order. Computed in tensor operations from out and lse: out is rounded
  /// twice, and a gradient flows through lse. Default: none.
  TORCH_ARG(std::optional<at::Tensor>, sinks) = std::nullopt;

 public:
  /// Sets `window_left` and `window_right`.
  AttentionOptions& window(std::optional<int64_t> left, std::optional<int64_t> right) {
    return window_left(left).window_right(right);
  }
};

/// Attention without scores in memory:
///
///     out[b, i, h] = sum over j of softmax over j of (scale * q[b, i, h] . k[b, j, g] + bias[h, i, j]) * v[b, j, g]
///
/// with g = h / (Hq / Hk) and, if `slopes` are set, the bias of `posenc/alibi.h`. The dispatcher operator
/// `posenc::alibi_attention` has kernels for CPU, CUDA and Meta. Autocast casts q, k and v as for LibTorch's
/// `scaled_dot_product_attention`.
///
/// Memory grows with Sq + Sk, not with their product. Scores, softmax and sums are float32 (float64 for float64).
/// q, k, v and slopes have first and second derivatives, in memory that grows likewise. Higher derivatives hold the
/// scores in memory and are not available under `torch.func`.
///
/// Packed sequences: in float16 and bfloat16 on a GPU of compute capability 8.0 or later, with up to 256 channels, the
/// kernels read the lengths, and no sequence is padded. All other calls are computed as padded batches of sequences of
/// similar length, so memory grows with the number of tokens. On a CPU time grows with the sum of the squared lengths.
/// On a GPU the host does not wait for the lengths. If the sequences padded to `max_seqlen` have more than 2 T tokens,
/// the time of these calls is at most that of 4 T tokens in sequences of `max_seqlen`.
///
/// float16 and bfloat16 are fused on GPUs of compute capability 8.0 and later, with up to 256 channels. On compute
/// capability 9.0 cuDNN computes the most common calls; its plans are built at the first call for a shape. A CUDA graph
/// of such a call can be captured only afterwards; otherwise the capture is an error. docs/attention.md says which path
/// computes which call. Results have the same bits every time; for gradients of q, k and v through cuDNN this needs
/// LibTorch's deterministic algorithms.
///
/// NaN and infinity past the lengths of a sequence, in rows of k and v, affect no result and no gradient. A row of k or
/// v may also be hidden from a query by the causal mask or the window. NaN in it does not affect that query in float32
/// and float64, nor on a CPU. Fused attention multiplies tiles of keys by probabilities, of which those of hidden keys
/// are 0. As 0 * NaN is NaN, a hidden NaN there reaches the queries that see another key of its tile.
///
/// @param q  `[B, Sq, Hq, D]`, or packed sequences `[T, Hq, D]`: float16, bfloat16, float32 or float64, any strides.
/// @param k,v  `[B, Sk, Hk, D]` or `[Tk, Hk, D]`, of the dtype and device of q; Hq is a multiple of Hk (GQA, MQA).
/// @return a tensor of the shape and dtype of q, in its memory layout if that is dense. Queries without a visible key,
///   or past the length of their sequence, give zeros and have zero gradients. A length beyond its tensor is an error
///   on the CPU. On a GPU, where the host cannot read it, it gives NaN for that sequence.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// Example:
/// ```
/// at::Tensor out = posenc::attention(q, k, v, posenc::AttentionOptions().causal(true));
/// ```
POSENC_API at::Tensor attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const AttentionOptions& options = {});

/// `attention` with the log-sum-exp (lse) of the logits of each row. Outputs over parts of the keys can be merged by
/// it: `out = sum of exp(lse_i - lse) out_i` with `lse = logsumexp of lse_i`. Both results have gradients.
///
/// @return `(out, lse)`; lse is `[B, Hq, Sq]`, or `[Hq, T]` for packed sequences, float32 (float64 for float64), and
///   minus infinity for queries without a visible key. Sinks are included: such queries then have their sink as lse.
POSENC_API std::tuple<at::Tensor, at::Tensor> attention_with_lse(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const AttentionOptions& options = {});

}  // namespace posenc
