#pragma once

#include <ATen/core/Tensor.h>

// Outputs of attention over parts of the keys, brought together by their log-sum-exp.
namespace posenc::blockwise {

/// `lse`, with 0 for rows that see nothing, so that exp(-inf - lse) is 0 and not NaN.
at::Tensor finite(const at::Tensor& lse);

/// Rows whose keys come in parts. Of what is there and what comes,
///
///     lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.
class MergedRows {
 public:
  /// @param out  `[B, S, H, D]`, of a tensor of its own: it may be written to.
  /// @param lse  `[B, H, S]` in the dtype of sums.
  void add(const at::Tensor& out, const at::Tensor& lse);

  /// After the first part: in the dtype of that while it is the only one, else in the dtype of sums.
  const at::Tensor& out() const { return out_; }
  const at::Tensor& lse() const { return lse_; }

 private:
  at::Tensor out_, lse_;
};

}  // namespace posenc::blockwise
