#pragma once

#include <posenc/attention.h>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <cstdint>
#include <optional>
#include <tuple>

// Arguments of `alibi_attention` and its derivatives and their checks.
namespace posenc::arguments {

/// The options of a call as they pass through the dispatcher.
/// @tparam Int  int64_t, or c10::SymInt where a graph with dynamic shapes may be traced.
template <typename Int>
struct AttentionOptions {
  std::optional<double> scale;
  bool causal = false;
  std::optional<Int> query_offset;
  std::optional<at::Tensor> seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k;
  std::optional<Int> max_seqlen_q, max_seqlen_k;
  std::optional<Int> window_left, window_right;
  std::optional<double> softcap;

  auto flat() const {
    return std::tie(
        scale, causal, query_offset, seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        window_left, window_right, softcap);
  }
};

/// Converts the options of the public function, except the slopes.
template <typename Int>
AttentionOptions<Int> attention_options(const posenc::AttentionOptions& o) {
  return {o.scale(),        o.causal(),       o.query_offset(), o.seqlens_q(),   o.seqlens_k(),    o.cu_seqlens_q(),
          o.cu_seqlens_k(), o.max_seqlen_q(), o.max_seqlen_k(), o.window_left(), o.window_right(), o.softcap()};
}

using ConcreteAttentionOptions = AttentionOptions<int64_t>;
using SymbolicAttentionOptions = AttentionOptions<c10::SymInt>;

// The tensors of each operator, in the order of its schema. They refer to the tensors of the call.

struct AttentionTensors {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const std::optional<at::Tensor>& slopes;  // [Hq] or [B, Hq]; nullopt means no bias

  auto flat() const { return std::tie(q, k, v, slopes); }
};

struct AttentionBackwardArguments {
  const at::Tensor& grad_out;
  const std::optional<at::Tensor>& grad_lse;  // nullopt means zero
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const std::optional<at::Tensor>& slopes;
  const at::Tensor& out;
  const at::Tensor& lse;

  AttentionTensors inputs() const { return {q, k, v, slopes}; }
  auto flat() const { return std::tie(grad_out, grad_lse, q, k, v, slopes, out, lse); }
};

struct AttentionDoubleBackwardArguments {
  const std::optional<at::Tensor>& grad_grad_q;  // gradient of dq; below of dk, dv and dslopes; nullopt means zero
  const std::optional<at::Tensor>& grad_grad_k;
  const std::optional<at::Tensor>& grad_grad_v;
  const std::optional<at::Tensor>& grad_grad_slopes;
  const at::Tensor& grad_out;
  const std::optional<at::Tensor>& grad_lse;
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const std::optional<at::Tensor>& slopes;

  AttentionTensors inputs() const { return {q, k, v, slopes}; }
  auto flat() const {
    return std::tie(grad_grad_q, grad_grad_k, grad_grad_v, grad_grad_slopes, grad_out, grad_lse, q, k, v, slopes);
  }
};

struct AttentionSlopeSumsArguments {
  const at::Tensor& grad_out;
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const std::optional<at::Tensor>& slopes;
  const at::Tensor& lse;

  AttentionTensors inputs() const { return {q, k, v, slopes}; }
  auto flat() const { return std::tie(grad_out, q, k, v, slopes, lse); }
};

/// Results of attention, and sinks `[Hq]`.
struct AttentionSinksArguments {
  const at::Tensor& out;
  const at::Tensor& lse;
  const at::Tensor& sinks;

  auto flat() const { return std::tie(out, lse, sinks); }
};

/// The options of a checked call that scores and masks depend on.
struct AttentionScores {
  double scale = 1;
  bool causal = false;
  // nullopt: `seqlens_k[b] - seqlens_q[b]`, per sequence; 0 if the same tensor was passed for both.
  std::optional<int64_t> query_offset;
  // A query at position p sees keys p - window_left to p + window_right. nullopt: it sees all keys on this side.
  std::optional<int64_t> window_left, window_right;
  std::optional<double> softcap;
};

/// A checked call. For packed tensors `batch` is the number of sequences, and `q_len` and `k_len` are at least the
/// length of the longest sequence.
struct AlibiAttention : AttentionScores {
  int64_t batch, q_len, k_len;
  int64_t q_heads, k_heads, head_dim;
  at::Tensor seqlens_q, seqlens_k;        // [B] or undefined
  at::Tensor cu_seqlens_q, cu_seqlens_k;  // [B + 1], both or none

  bool packed() const { return cu_seqlens_q.defined(); }
};

/// Checks the slopes of a public function that takes them as an argument and not in its options.
/// @throws c10::Error  if they are undefined, or if `in_options` has slopes as well.
void check_slopes_argument(const char* op, const at::Tensor& slopes, const std::optional<at::Tensor>& in_options);

/// Checks a call of the operator `op`.
/// @throws c10::Error  naming the argument, what was expected and what was given. The functions below throw the same.
AlibiAttention check_attention(const char* op, const AttentionTensors& inputs, const ConcreteAttentionOptions& options);
AlibiAttention check_attention_backward(
    const char* op,
    const AttentionBackwardArguments& arguments,
    const ConcreteAttentionOptions& options);
AlibiAttention check_attention_double_backward(
    const char* op,
    const AttentionDoubleBackwardArguments& arguments,
    const ConcreteAttentionOptions& options);
void check_attention_sinks(const char* op, const AttentionSinksArguments& arguments);
AlibiAttention check_attention_slope_sums(
    const char* op,
    const AttentionSlopeSumsArguments& arguments,
    const ConcreteAttentionOptions& options);

}  // namespace posenc::arguments
