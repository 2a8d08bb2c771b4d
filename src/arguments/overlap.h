#pragma once

#include <ATen/core/Tensor.h>

// What operators that write in place ask about memory.
namespace posenc::arguments {

/// Whether two elements of `tensor` may be the same memory. Exact for slices and permutations of dense tensors.
bool may_overlap(const at::Tensor& tensor);

/// Whether an element of `a`, of which no two are the same memory, may be memory of `b`. Exact for tensors with the
/// same strides, as the slices of a packed projection are; else true where the first and last bytes interleave. False
/// for tensors without data.
bool may_overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace posenc::arguments
