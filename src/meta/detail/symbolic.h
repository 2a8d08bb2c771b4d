#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <initializer_list>

namespace posenc::meta {

/// Sizes that are still symbols (torch.compile with dynamic shapes) cannot be compared with numbers; the kernel
/// checks them when they are known.
inline bool has_symbolic_sizes(const at::Tensor& tensor) {
  return tensor.defined() && tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

inline bool any_symbolic(std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors) {
  return std::any_of(
      tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return has_symbolic_sizes(tensor); });
}

}  // namespace posenc::meta
