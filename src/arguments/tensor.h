#pragma once

#include <ATen/core/Tensor.h>

// Checks that all operators share.
namespace posenc::arguments {

/// Every operator serves these four.
inline bool is_served(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

/// Without a tensor the dispatcher has no device to go by, and says that rather than what is wrong: so free functions
/// check the argument that it goes by before they call it.
inline void check_defined(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), op, ": expected ", name, " to be a tensor, got an undefined one");
}

/// The stride of a dimension of one entry means nothing and may be anything: 0 is aligned for every vector width.
inline int64_t used_stride(const at::Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
}

}  // namespace posenc::arguments
