#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/nonzero.h>

#include <cstdint>
#include <vector>

namespace posenc::detail {

/// Index of the first true element of the bool tensor `mask`, one number for each dimension. At least one element must
/// be true. Waits for the device of `mask`.
inline std::vector<int64_t> first_index(const at::Tensor& mask) {
  const at::Tensor index = at::nonzero(mask).select(0, 0).cpu().contiguous();  // rows of nonzero() are strided
  return {index.const_data_ptr<int64_t>(), index.const_data_ptr<int64_t>() + index.numel()};
}

}  // namespace posenc::detail
