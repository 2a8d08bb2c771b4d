#pragma once

#include <arguments/tensor.h>

// Checks of memory overlap for operators that write in place.
namespace posenc::arguments {

/// Refuses `x` if two of its elements may share memory. Exact for slices and permutations of dense tensors.
void check_no_overlap(const char* op, const NamedTensor& x);

/// Refuses `x`, whose elements do not overlap, and `y` if they may share memory. Exact for tensors with the same
/// strides, e.g. slices of a packed projection; otherwise refuses byte ranges that intersect. Accepts meta and empty
/// tensors.
void check_no_overlap(const char* op, const NamedTensor& x, const NamedTensor& y);

}  // namespace posenc::arguments
