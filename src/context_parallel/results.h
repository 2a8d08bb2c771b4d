#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

// Results over all keys from those over parts of the keys. They are rounded to the dtype of q once.
namespace posenc::context_parallel {

/// Output rows of attention over the keys of all parts that have been added. Two parts are merged as
///
///     lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2.
class MergedRows {
 public:
  /// @param out  `[B, S, H, D]`.
  /// @param lse  `[B, H, S]` in the dtype of sums.
  void add(const at::Tensor& out, const at::Tensor& lse);

  /// Writes the rows and their log-sum-exp. Needs at least one part.
  void finish(const at::Tensor& out, const at::Tensor& lse) const;

 private:
  at::Tensor out_, lse_;            // of all parts but the last; undefined before the second one
  at::Tensor last_out_, last_lse_;  // of the last part
};

/// The sum of gradients `[B, S, H, D]` of parts.
class GradientSum {
 public:
  /// @param dtype  of the gradients of parts. Sums of them, in the dtype of sums, can be added too.
  explicit GradientSum(at::ScalarType dtype) : dtype_(dtype) {}

  void add(const at::Tensor& term);

  /// Writes the sum, of at least one term.
  void finish(const at::Tensor& result) const;

 private:
  at::ScalarType dtype_;
  std::vector<at::Tensor> terms_;
};

}  // namespace posenc::context_parallel
