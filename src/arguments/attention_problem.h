#pragma once

#include <cstdint>

// Attention as CUDA kernels see it. No torch.
namespace posenc {

/// Strides of `[B, S, H, D]` or of packed `[T, H, D]` (`batch` is 0), in elements. Channels are dense.
struct HeadStrides {
  int64_t batch, token, head;
};

/// Strides of a number for each row, `[B, H, S]` or packed `[H, T]` (`batch` is 0), in elements.
struct RowStrides {
  int64_t batch, head, token;
};

/// The windows of `AttentionProblem` if they are not limited.
constexpr int32_t kUnlimitedWindow = 1 << 30;

/// `softmax(softcap(scale q k^T) + bias + mask) v` for a batch of sequences. Addresses of tokens are multiples of 16
/// bytes.
struct AttentionProblem {
  const void* q;
  const void* k;
  const void* v;
  HeadStrides q_strides, k_strides, v_strides;
  const void* slopes;        // [Hq], or with `slopes_stride` [B, Hq]; null: no bias. float32, or float64 for float64
  int64_t slopes_stride;     // from one sequence to the next, or 0
  const int64_t* seqlens_q;  // [B] of padded sequences, or null: all tokens
  const int64_t* seqlens_k;
  const int64_t* cu_seqlens_q;  // [B + 1] of packed sequences, or null
  const int64_t* cu_seqlens_k;
  int64_t q_tokens, k_tokens;  // of packed tensors
  int32_t batch;               // number of sequences
  int32_t q_len, k_len;        // of padded tensors; of packed ones the largest length
  int32_t q_heads, group;      // group: query heads that share a key head
  int32_t head_dim;            // a multiple of 8
  double scale;
  double softcap;        // scaled products s become softcap * tanh(s / softcap); 0: they do not
  bool has_offset;       // otherwise the last query of a sequence is at its last key
  int32_t query_offset;  // position of query 0 among the keys
  int32_t window_left;   // a query at position p sees the keys from p - window_left to p + window_right
  int32_t window_right;  // 0 with a causal mask
};

struct AttentionForwardProblem : AttentionProblem {
  void* out;
  HeadStrides out_strides;
  float* lse;  // log-sum-exp of the scores of each row
  RowStrides lse_strides;
  // Parts of the keys that are computed by different blocks, if there are few queries. With more than one part, results
  // of the parts are [splits, rows, head_dim] and [splits, rows], where `rows` is the number of rows of all heads.
  int32_t splits;
  int64_t rows;
  float* split_out;
  float* split_lse;
};

struct AttentionBackwardProblem : AttentionProblem {
  const void* grad_out;
  const void* out;
  HeadStrides grad_out_strides, out_strides;
  const float* lse;
  const float* grad_lse;  // or null: zero
  RowStrides lse_strides, grad_lse_strides;
  void* grad_q;  // or null; the others likewise
  void* grad_k;
  void* grad_v;
  HeadStrides grad_q_strides, grad_k_strides, grad_v_strides;
  // Scratch: for each row its `shift` and `delta` (see cuda/detail/attention_row_terms.cuh), [B, Hq, Sq] or [Hq, T].
  float* row_terms;
  RowStrides row_terms_strides;  // in pairs
  // The gradient of the slopes, float32 [Hq], or [B, Hq] with `slopes_stride`; or null. `slope_sums` is scratch,
  // [Hq, B, tiles] or packed [Hq, tiles]: minus the gradient, of each tile of queries.
  float* grad_slopes;
  double* slope_sums;
  double* row_sums;  // [4, B, Hq, Sq] of padded tensors, or null: sums of P, P d, P dP and P dP d
};

/// Results of attention over some of the keys: out `[B, S, H, D]`, lse `[B, H, S]` in the dtype of sums.
struct PartRows {
  const void* out;
  HeadStrides out_strides;
  const void* lse;
  RowStrides lse_strides;
};

/// Two parts, and the results over the keys of both.
struct MergePartsProblem {
  PartRows first, second;
  void* out;
  HeadStrides out_strides;
  void* lse;
  RowStrides lse_strides;
  int32_t batch, rows, heads, head_dim;
};

/// A gradient `[B, S, H, D]`.
struct SumTerm {
  const void* data;
  HeadStrides strides;
  bool wide;  // of the dtype of sums, if it differs from that of the other terms
};

/// The most gradients that one kernel adds.
constexpr int32_t kMostSumTerms = 4;

struct SumPartsProblem {
  SumTerm terms[kMostSumTerms];
  int32_t count;
  void* out;
  HeadStrides out_strides;
  int32_t batch, rows, heads, head_dim;
};

/// A block of rows of the scores `q k^T`, `[B, Hq, rows, keys]`, of padded sequences: queries `first_row` to
/// `first_row + rows - 1` and keys `first_key` to `first_key + keys - 1`. float32 or float64.
struct AttentionRowsProblem : AttentionProblem {
  int32_t first_row, rows;
  int32_t first_key, keys;
  void* scores;        // products of queries and keys; overwritten by probabilities
  void* gradients;     // products of the gradient of the output and values, dP; overwritten by dS. Null: forward pass
  void* lse;           // [B, Hq, Sq]: written by the forward pass, read by the backward pass
  const void* values;  // [B, Hk, Sk, D]
  void* out;           // [B, Hq, rows, D]: products of probabilities and finite values
  int32_t* infinite;   // [B, Hk]: whether a head has values that are infinite or NaN
  const void* delta;   // [B, Hq, Sq]: rowsum(dout out) - dlse; null: zero
  double* row_sums;    // as in AttentionBackwardProblem
};

}  // namespace posenc
