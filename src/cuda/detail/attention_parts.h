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

/// Writes the results over the keys of both parts to the tensors of `result`.
/// @param second  its `out` has the dtype of q. That of `first` and of `result` is either the dtype of q or the dtype
/// of
///     sums: float64 for float64, float32 for all others.
void merge_attention_parts(const AttentionPart& first, const AttentionPart& second, const AttentionPart& result);

/// Writes the sum of gradients to `result`, rounded once.
/// @param terms  at most `kMostSumTerms`, `[B, S, H, D]`, each of `dtype` or of the dtype of sums, as is `result`.
void sum_attention_parts(at::ArrayRef<at::Tensor> terms, at::ScalarType dtype, const at::Tensor& result);

}  // namespace posenc::cuda
