#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

// From run-time values to template arguments.
namespace posenc::cuda {

template <typename T>
struct Type {
  using type = T;
};

/// Calls `body` with `Type<T>`, T being the CUDA type of `dtype`.
template <typename Body>
void for_dtype(at::ScalarType dtype, Body&& body) {
  switch (dtype) {
    case at::kHalf:
      return body(Type<__half>{});
    case at::kBFloat16:
      return body(Type<__nv_bfloat16>{});
    case at::kFloat:
      return body(Type<float>{});
    case at::kDouble:
      return body(Type<double>{});
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for dtype ", dtype);
  }
}

/// Calls `body` with `std::true_type` or `std::false_type`.
template <typename Body>
void for_bool(bool value, Body&& body) {
  if (value) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace posenc::cuda
