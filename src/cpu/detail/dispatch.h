#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <type_traits>

// Maps run-time values to template arguments, and storage types to arithmetic types.
namespace posenc::cpu {

/// The arithmetic type of a storage type.
template <typename T>
using arithmetic_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct Type {
  using type = T;
};

/// Calls `body` with `Type<T>`, where T is the C++ type of `dtype`.
template <typename Body>
void for_dtype(at::ScalarType dtype, Body&& body) {
  switch (dtype) {
    case at::kHalf:
      return body(Type<at::Half>{});
    case at::kBFloat16:
      return body(Type<at::BFloat16>{});
    case at::kFloat:
      return body(Type<float>{});
    case at::kDouble:
      return body(Type<double>{});
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for dtype ", dtype);
  }
}

}  // namespace posenc::cpu
