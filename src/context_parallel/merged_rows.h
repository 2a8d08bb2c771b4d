#pragma once

#include <ATen/core/Tensor.h>

namespace posenc::context_parallel {

/// Output rows of attention over the keys of all parts that have been added. Two parts are merged as
///
///     lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.
class MergedRows {
 public:
  /// @param out  `[B, S, H, D]`.
  /// @param lse  `[B, H, S]` in the dtype of sums.
  void add(const at::Tensor& out, const at::Tensor& lse);

  /// Defined after the first part. The dtype is that of the first part until a second one is added, then that of sums.
  const at::Tensor& out() const { return out_; }
  const at::Tensor& lse() const { return lse_; }

 private:
  at::Tensor out_, lse_;
};

}  // namespace posenc::context_parallel
