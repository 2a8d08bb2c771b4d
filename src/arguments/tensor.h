#pragma once

#include <ATen/core/Tensor.h>

// Checks that all operators share.
namespace posenc::arguments {

/// Whether `dtype` is one of the four that all operators accept.
inline bool is_served(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

/// Free functions check the first tensor with this before they call the dispatcher. Without a tensor the dispatcher has
/// no device to dispatch on, and its own message does not name the argument.
inline void check_defined(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), op, ": expected ", name, " to be a tensor, got an undefined one");
}

/// The stride of a dimension, or 0 if its size is 1: such a stride is arbitrary, and 0 is aligned for every vector
/// width.
inline int64_t used_stride(const at::Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
}

}  // namespace posenc::arguments
