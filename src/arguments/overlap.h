#pragma once

#include <ATen/core/Tensor.h>

// Checks of memory overlap for operators that write in place.
namespace posenc::arguments {

/// Whether two elements of `tensor` may share memory. Exact for slices and permutations of dense tensors.
bool may_overlap(const at::Tensor& tensor);

/// Whether `a`, whose elements do not overlap, and `b` may share memory. Exact for tensors with the same strides, e.g.
/// slices of a packed projection; otherwise true if their byte ranges intersect. False for meta and empty tensors.
bool may_overlap(const at::Tensor& a, const at::Tensor& b);

}  // namespace posenc::arguments
