#pragma once

#include <arguments/alibi.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

// Outputs of attention without data.
namespace posenc::meta {

/// The log-sum-exp of queries `q`: `[B, Hq, Sq]`; packed, `[Hq, T]` as the transpose of a contiguous tensor.
inline at::Tensor empty_lse(const at::Tensor& q) {
  const auto options = q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type()));
  return q.dim() == 3 ? at::empty_symint({q.sym_size(0), q.sym_size(1)}, options).t()
                      : at::empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(1)}, options);
}

/// Undefined without slopes.
inline at::Tensor empty_slopes_gradient(const at::Tensor& q, const std::optional<at::Tensor>& slopes) {
  if (!slopes.has_value()) {
    return {};
  }
  return at::empty_symint(slopes->sym_sizes(), q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type())));
}

}  // namespace posenc::meta
