#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <optional>

namespace posenc::meta {

/// Sizes that are still symbols (torch.compile with dynamic shapes) cannot be compared with numbers; the kernel
/// checks them when they are known.
inline bool has_symbolic_sizes(const at::Tensor& tensor) {
  return tensor.defined() && tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

/// The same of an integer argument.
inline bool is_symbolic(const std::optional<c10::SymInt>& value) {
  return value.has_value() && value->is_symbolic();
}

/// The number that an argument which is no symbol stands for.
inline std::optional<int64_t> concrete(const std::optional<c10::SymInt>& value) {
  return value.has_value() ? std::optional<int64_t>(value->expect_int()) : std::nullopt;
}

inline bool any_symbolic(std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors) {
  return std::any_of(
      tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return has_symbolic_sizes(tensor); });
}

}  // namespace posenc::meta
