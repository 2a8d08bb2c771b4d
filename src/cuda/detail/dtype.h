#pragma once

#include <cuda/detail/host.h>

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

namespace posenc::cuda {

inline DType dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for dtype ", dtype);
  }
}

}  // namespace posenc::cuda
