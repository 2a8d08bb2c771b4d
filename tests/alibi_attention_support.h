#pragma once

#include "support.h"

#include <posenc/alibi_attention.h>

/// What the tests of attention share: calls of it, and their results by a scalar loop in float64 with the errors that
/// rounding may make.
namespace posenc::test {

/// One call, described so that it can be printed and made again.
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
  std::optional<double> scale = std::nullopt;
  std::vector<int64_t> seqlens_q = {};  // empty: none
  std::vector<int64_t> seqlens_k = {};
  std::vector<int64_t> cu_seqlens_q = {};  // not empty: packed, of q_len and k_len tokens
  std::vector<int64_t> cu_seqlens_k = {};
  Strides strides = Strides::dense;
  bool every_other_slope = false;
  double largest_slope = 1;

  bool packed() const { return !cu_seqlens_q.empty(); }
};

std::ostream& operator<<(std::ostream& stream, const AttentionCase& c);

struct AttentionInputs {
  at::Tensor q, k, v, slopes;
  ALiBiAttentionOptions options;
};

/// Arguments as `c` describes them, drawn on the CPU and so the same for every device. Slopes are multiples of 2^-8.
AttentionInputs make_attention_inputs(const AttentionCase& c, const Target& target);

/// Detached copies of these arguments that require grad.
AttentionInputs attention_leaves(const AttentionInputs& in);

/// Calls of the operator.
at::Tensor attend(const AttentionInputs& in);
std::tuple<at::Tensor, at::Tensor> attend_with_lse(const AttentionInputs& in);

/// `alibi_attention_slope_sums`, which the library keeps to itself, as Python calls it.
at::Tensor slope_sums(const AttentionInputs& in, const at::Tensor& grad, const at::Tensor& lse);

/// Results, or bounds of their errors, float64 on the CPU.
struct AttentionResults {
  at::Tensor out, lse, dq, dk, dv, dslopes;
};

struct ScalarAttention {
  AttentionResults values;
  AttentionResults bounds;
};

/// What the operator gives for `in`, and the gradients of `sum(out * grad_out) + sum(lse * grad_lse)`, by a loop over
/// scalars from the formulas alone. Bounds hold for sums in any order in float32 (float64 for float64).
///
/// @param probability_roundoff  error of a probability or of its gradient that is rounded on its way into a product.
ScalarAttention scalar_attention(
    const AttentionInputs& in,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    double probability_roundoff = 0);

}  // namespace posenc::test
