#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace posenc::cuda {

/// Results of attention over some of the keys.
struct AttentionPart {
  at::Tensor out;  // [B, S, H, D]
  at::Tensor lse;  // [B, H, S] in the dtype of sums; -inf: the row sees none of the keys
};

/// The results over the keys of both parts, in one kernel: `(out, lse)` in the dtype of sums.
/// @param first  its `out` has the dtype of that of `second`, or that of sums.
std::tuple<at::Tensor, at::Tensor> merge_attention_parts(const AttentionPart& first, const AttentionPart& second);

}  // namespace posenc::cuda
