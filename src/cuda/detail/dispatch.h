#pragma once

#include <cuda/detail/host.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

// Maps run-time values to template arguments. No torch.
namespace posenc::cuda {

/// Heads of more channels have no kernel of attention.
constexpr int kMaxAttentionHeadDim = 256;

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

/// The same for a dtype that is float16 or bfloat16.
template <typename Body>
void for_16_bit(DType dtype, Body&& body) {
  dtype == DType::float16 ? body(Type<__half>{}) : body(Type<__nv_bfloat16>{});
}

/// Calls `body` with the largest head size of the smallest kernel of attention for heads of `head_dim` channels, as a
/// `std::integral_constant`.
template <typename Body>
void for_head_size(int head_dim, Body&& body) {
  if (head_dim <= 64) {
    body(std::integral_constant<int, 64>{});
  } else if (head_dim <= 128) {
    body(std::integral_constant<int, 128>{});
  } else {
    body(std::integral_constant<int, kMaxAttentionHeadDim>{});
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
