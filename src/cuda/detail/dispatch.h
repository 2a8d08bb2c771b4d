#pragma once

#include <cuda/detail/host.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

// Maps run-time values to template arguments. No torch.
namespace posenc::cuda {

template <typename T>
struct Type {
  using type = T;
};

/// Calls `body` with `Type<T>`, where T is the CUDA type of `dtype`.
template <typename Body>
void for_dtype(DType dtype, Body&& body) {
  switch (dtype) {  // NOLINT(bugprone-branch-clone): each branch has another type
    case DType::float16:
      return body(Type<__half>{});
    case DType::bfloat16:
      return body(Type<__nv_bfloat16>{});
    case DType::float32:
      return body(Type<float>{});
    case DType::float64:
      return body(Type<double>{});
  }
}

/// The same for a dtype that is float32 or float64.
template <typename Body>
void for_real(DType dtype, Body&& body) {
  dtype == DType::float64 ? body(Type<double>{}) : body(Type<float>{});
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
