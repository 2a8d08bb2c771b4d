#pragma once

#include <arguments/alibi_attention.h>
#include <arguments/attention_problem.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

// The arguments of attention as its kernels see them.
namespace posenc::cuda {

/// @param x  `[B, S, H, D]` or `[T, H, D]`.
inline HeadStrides head_strides(const at::Tensor& x) {
  return x.dim() == 4 ? HeadStrides{x.stride(0), x.stride(1), x.stride(2)} : HeadStrides{0, x.stride(0), x.stride(1)};
}

/// @param x  `[B, H, S]` or `[H, T]`.
inline RowStrides row_strides(const at::Tensor& x) {
  return x.dim() == 3 ? RowStrides{x.stride(0), x.stride(1), x.stride(2)} : RowStrides{0, x.stride(0), x.stride(1)};
}

/// Sets the options of a call that scores and masks depend on.
inline void set_scores(AttentionProblem& problem, const arguments::AttentionScores& scores) {
  const auto window = [](const std::optional<int64_t>& side) {
    return static_cast<int32_t>(std::min<int64_t>(side.value_or(kUnlimitedWindow), kUnlimitedWindow));
  };
  problem.scale = scores.scale;
  problem.softcap = scores.softcap.value_or(0);
  problem.has_offset = scores.query_offset.has_value();
  problem.query_offset = static_cast<int32_t>(scores.query_offset.value_or(0));
  problem.window_left = window(scores.window_left);
  problem.window_right = scores.causal ? 0 : window(scores.window_right);
}

/// @param slopes  `[Hq]` or `[B, Hq]`, dense; undefined: no bias. Must outlive the launch.
inline void set_slopes(AttentionProblem& problem, const at::Tensor& slopes) {
  if (slopes.defined()) {
    problem.slopes = slopes.const_data_ptr();
    problem.slopes_stride = slopes.dim() == 2 ? slopes.size(1) : 0;
  }
}

}  // namespace posenc::cuda
