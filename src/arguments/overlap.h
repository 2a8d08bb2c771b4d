#pragma once

#include <ATen/core/Tensor.h>

// Checks of memory overlap for operators that write in place.
namespace posenc::arguments {

/// Whether two elements of `tensor` may share memory. Exact for slices and permutations of dense tensors.
bool may_overlap(const at::Tensor& tensor);

/// Whether `a` and `b` may share memory; no two elements of `a` do. Exact for tensors with the same strides, such as
/// slices of a packed projection; otherwise true if their ranges of bytes intersect. False for tensors without data.
bool may_overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace posenc::arguments
