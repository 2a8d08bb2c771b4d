#pragma once

#include "support.h"

#include <posenc/alibi_attention.h>

/// Shared by the tests of attention: random calls, and expected results from scalar loops in float64 with error bounds.
namespace posenc::test {

/// Printable description of one call, from which `make_attention_inputs` makes the arguments.
struct AttentionCase {
  std::string name = "Default";
  int64_t batch = 2;
  int64_t q_len = 5;
  int64_t k_len = 7;
  int64_t q_heads = 4;
  int64_t k_heads = 2;
  int64_t head_dim = 8;
  bool causal = false;
  std::optional<int64_t> query_offset = std::nullopt;
  std::optional<int64_t> window_left = std::nullopt;
  std::optional<int64_t> window_right = std::nullopt;
  std::optional<double> scale = std::nullopt;
  std::optional<double> softcap = std::nullopt;
  std::vector<int64_t> seqlens_q = {};  // empty: nullopt
  std::vector<int64_t> seqlens_k = {};
  std::vector<int64_t> cu_seqlens_q = {};  // not empty: packed, q_len and k_len tokens in total
  std::vector<int64_t> cu_seqlens_k = {};
  Strides strides = Strides::dense;
  bool with_slopes = true;
  bool slopes_of_sequences = false;  // [B, Hq] or [N, Hq] instead of [Hq]
  bool every_other_slope = false;
  double largest_slope = 1;

  bool packed() const { return !cu_seqlens_q.empty(); }
};

std::ostream& operator<<(std::ostream& stream, const AttentionCase& c);

/// `slopes` are undefined without a bias.
struct AttentionInputs {
  at::Tensor q, k, v, slopes;
  ALiBiAttentionOptions options;
};

/// Arguments as `c` describes them, drawn on the CPU, so every device gets the same. Slopes: multiples of 2^-8 times
/// `largest_slope`.
AttentionInputs make_attention_inputs(const AttentionCase& c, const Target& target);

/// The same arguments with q, k, v and slopes in float64.
AttentionInputs in_float64(const AttentionInputs& in);

/// `|actual - expected| / |expected|` in the Euclidean norm, in float64.
double relative_error(const at::Tensor& actual, const at::Tensor& expected);

/// The same arguments with detached q, k, v and slopes that require grad.
AttentionInputs attention_leaves(const AttentionInputs& in);

/// `alibi_attention` and `alibi_attention_with_lse` on these arguments; without slopes `attention` and
/// `attention_with_lse`.
at::Tensor attend(const AttentionInputs& in);
std::tuple<at::Tensor, at::Tensor> attend_with_lse(const AttentionInputs& in);

/// `reference::attention` on these arguments.
std::tuple<at::Tensor, at::Tensor> reference_attention(const AttentionInputs& in);

/// The internal operator `alibi_attention_slope_sums`, called boxed as from Python.
at::Tensor slope_sums(const AttentionInputs& in, const at::Tensor& grad, const at::Tensor& lse);

/// Results and gradients, or bounds of their errors; float64 on the CPU. `dslopes` is undefined without slopes.
struct AttentionResults {
  at::Tensor out, lse, dq, dk, dv, dslopes;
};

struct ScalarAttention {
  AttentionResults values;
  AttentionResults bounds;
};

/// Results of `attend_with_lse(in)` and gradients of `sum(out * grad_out) + sum(lse * grad_lse)`, by a scalar
/// loop over the formulas. Bounds hold for sums in any order in float32 (float64 for float64).
///
/// @param probability_roundoff  unit roundoff of the dtype to which a kernel rounds probabilities and their gradients
///                              before a matrix product; 0 if it does not round them.
ScalarAttention scalar_attention(
    const AttentionInputs& in,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    double probability_roundoff = 0);

/// Expects `|actual - expected| <= bound` for finite elements of `expected`, and equal infinities.
void expect_held(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound, const char* name);

/// Results of a call, gradients for random cotangents, and the expected values.
struct Held {
  AttentionResults actual;
  ScalarAttention expected;
};
Held hold(const AttentionInputs& inputs);

/// Expects the dtypes and values of results and gradients of a call to be those of `scalar_attention`.
void expect_scalar_results(const AttentionInputs& inputs);

}  // namespace posenc::test
