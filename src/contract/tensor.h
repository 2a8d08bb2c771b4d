#pragma once

#include <ATen/core/Tensor.h>

// What the contracts of all operators share.
namespace posenc::contract {

/// Every operator serves these four.
inline bool is_served(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

/// The stride of a dimension of one entry means nothing and may be anything: 0 is aligned for every vector width.
inline int64_t used_stride(const at::Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
}

}  // namespace posenc::contract
