#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/nonzero.h>

#include <cstdint>
#include <vector>

namespace posenc::detail {

/// Index of the first element of `mask`, a bool tensor, that is true: one number for each dimension. At least one
/// element must be true. Waits for the device of `mask`.
inline std::vector<int64_t> first_index(const at::Tensor& mask) {
  const at::Tensor index = at::nonzero(mask).select(0, 0).cpu().contiguous();  // columns of nonzero() are dense
  return {index.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>() + index.numel()};
}

}  // namespace posenc::detail
