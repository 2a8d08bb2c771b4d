#pragma once

#include "alibi_attention_support.h"

#include <vector>

/// For the tests of flash-attention: calls in plain tensor operations, and the comparison of errors.
namespace posenc::test {

/// Multiples of the errors of tensor operations in the dtype, and absolute errors in addition to them.
struct Tolerance {
  double out = 2;
  double gradients = 2;
  double out_plus = 1e-5;
  double gradients_plus = 1e-5;
};

/// How the sequences of a call are passed.
enum class Form {
  padded,
  packed  // sequences of lengths `seqlens_q` and `seqlens_k` of the call
};

/// The arguments with leaves of q, k and v. The slopes have no gradient.
AttentionInputs qkv_leaves(const AttentionInputs& in);

/// The same call with packed sequences of lengths `seqlens_q` and `seqlens_k`.
AttentionInputs packed(const AttentionInputs& in, const AttentionCase& c);

/// Compares results with the same call in float32 tensor operations, rounded to the dtype of q. Their largest absolute
/// difference is at most `tolerance` with that of tensor operations in the dtype of q.
///
/// @param in    padded q, k and v, also with `Form::packed`. The last query of a sequence is at its last key.
/// @param grad  a gradient of the output, `[B, Sq, Hq, D]`, for which also the gradients of q, k and v are compared;
///              undefined: none.
void expect_exact(
    const AttentionCase& c,
    const AttentionInputs& in,
    const at::Tensor& grad,
    const Tolerance& tolerance,
    Form form = Form::padded);

}  // namespace posenc::test
