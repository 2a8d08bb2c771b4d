#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

// Checks that all operators share.
namespace posenc::arguments {

/// An argument and its name in the schema, or the name of another tensor in messages.
struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};

/// Whether `dtype` is one of the four that all operators accept.
inline bool is_served(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble;
}

/// Free functions check the first tensor with this before they call the dispatcher. Without a tensor the dispatcher has
/// no device to dispatch on, and its own message does not name the argument.
inline void check_defined(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), op, ": expected ", name, " to be a tensor, got an undefined one");
}

/// Checks that `is_served` is true of the dtype of `x`.
inline void check_served(const char* op, const NamedTensor& x) {
  const auto dtype = x.tensor.scalar_type();
  TORCH_CHECK(
      is_served(dtype), op, ": expected ", x.name, " of dtype float16, bfloat16, float32 or float64, got ", dtype);
}

/// Checks that `x` is on the device of `y`.
inline void check_device(const char* op, const NamedTensor& x, const NamedTensor& y) {
  TORCH_CHECK(
      x.tensor.device() == y.tensor.device(), op, ": expected ", x.name, " on the device of ", y.name, ", ",
      y.tensor.device(), ", got ", x.tensor.device());
}

/// Checks that `x` has the shape, dtype and device of `y`.
inline void check_like(const char* op, const NamedTensor& x, const NamedTensor& y) {
  const auto description = [](const at::Tensor& tensor) {
    return c10::str(tensor.sizes(), " ", tensor.scalar_type(), " ", tensor.device());
  };
  TORCH_CHECK(
      x.tensor.defined() && x.tensor.sizes() == y.tensor.sizes() && x.tensor.scalar_type() == y.tensor.scalar_type() &&
          x.tensor.device() == y.tensor.device(),
      op, ": expected ", x.name, " of the shape, dtype and device of ", y.name, ", ", description(y.tensor), ", got ",
      x.tensor.defined() ? description(x.tensor) : "an undefined tensor");
}

/// The stride of a dimension, or 0 if its size is 1: such a stride is arbitrary, and 0 is aligned for every vector
/// width.
inline int64_t used_stride(const at::Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 0 : tensor.stride(dim);
}

}  // namespace posenc::arguments
