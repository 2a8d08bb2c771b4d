#pragma once

#include <ATen/core/Tensor.h>

namespace posenc::meta {

/// Sizes that are still symbols (torch.compile with dynamic shapes) cannot be compared with numbers; the kernel
/// checks them when they are known.
inline bool has_symbolic_sizes(const at::Tensor& tensor) {
  return tensor.defined() && tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

}  // namespace posenc::meta
