#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

// Results of attention over parts of the keys, each function in one kernel.
namespace posenc::cuda {

/// Results of attention over some of the keys.
struct AttentionPart {
  at::Tensor out;  // [B, S, H, D]
  at::Tensor lse;  // [B, H, S] in the dtype of sums; -inf: the row sees none of the keys
};

/// Writes the results over the keys of both parts.
/// @param second  `out` has the dtype of q; in the others it has this dtype or that of sums.
void merge_attention_parts(const AttentionPart& first, const AttentionPart& second, const AttentionPart& result);

/// The most terms of `sum_attention_parts`.
constexpr size_t kMostTerms = 4;

/// Writes the sum of gradients to `result`, rounded once.
/// @param terms  `[B, S, H, D]`, of `dtype` or the dtype of sums, as is `result`.
void sum_attention_parts(at::ArrayRef<at::Tensor> terms, at::ScalarType dtype, const at::Tensor& result);

}  // namespace posenc::cuda
