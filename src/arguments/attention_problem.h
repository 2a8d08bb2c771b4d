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

/// `softmax(scale q k^T + bias + mask) v` for a batch of sequences. Addresses of tokens are multiples of 16 bytes.
struct AttentionProblem {
  const void* q;
  const void* k;
  const void* v;
  HeadStrides q_strides, k_strides, v_strides;
  const float* slopes;       // [Hq], or with `slopes_stride` [B, Hq]; null: no bias
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
  float scale;
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
  // [Hq, B, tiles] or packed [Hq, tiles], zero at first, or null: minus the gradient of the slopes, of each tile.
  double* slope_sums;
  double* row_sums;  // [4, B, Hq, Sq] of padded tensors, or null: sums of P, P d, P dP and P dP d
};

}  // namespace posenc
