#include <arguments/overlap.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace posenc::arguments {
namespace {

using at::Tensor;

/// Number of bytes from the first element to the end of the last one.
int64_t extent_in_bytes(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += tensor.stride(d) * (tensor.size(d) - 1);
  }
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

/// A dimension of two tensors a and b: its stride, and the range `-below` to `above` of (index in a) - (index in b).
struct Difference {
  int64_t stride, below, above;
};

/// Whether a choice of differences in `dims[next]` and later has offsets that sum to `target`. Strides descend.
bool reaches(const std::vector<Difference>& dims, size_t next, int64_t target) {
  if (next == dims.size()) {
    return target == 0;
  }
  int64_t below = 0;  // the sum over later dimensions is from -below to above
  int64_t above = 0;
  for (size_t d = next + 1; d < dims.size(); ++d) {
    below += dims[d].stride * dims[d].below;
    above += dims[d].stride * dims[d].above;
  }
  const auto& [stride, least, most] = dims[next];
  // stride * index is in [target - above, target + below]: two or three indices if no two elements of a tensor overlap.
  const int64_t first = std::max(-least, (target - above) / stride - 1);
  const int64_t last = std::min(most, (target + below) / stride + 1);
  for (int64_t index = first; index <= last; ++index) {
    if (reaches(dims, next + 1, target - stride * index)) {
      return true;
    }
  }
  return false;
}

bool may_overlap(const Tensor& tensor) {
  if (tensor.numel() == 0) {
    return false;
  }
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) {
      dims.emplace_back(tensor.stride(d), tensor.size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;  // largest offset in the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (stride <= last) {
      return true;
    }
    last += stride * (size - 1);
  }
  return false;
}

bool may_overlap(const Tensor& a, const Tensor& b) {
  if (a.is_meta() || b.is_meta() || a.numel() == 0 || b.numel() == 0) {
    return false;
  }
  const char* a_begin = static_cast<const char*>(a.const_data_ptr());
  const char* b_begin = static_cast<const char*>(b.const_data_ptr());
  if (a_begin + extent_in_bytes(a) <= b_begin || b_begin + extent_in_bytes(b) <= a_begin) {
    return false;
  }
  const auto size = static_cast<int64_t>(a.element_size());
  const int64_t distance = b_begin - a_begin;
  if (a.dim() != b.dim() || a.element_size() != b.element_size() || distance % size != 0) {
    return true;
  }
  std::vector<Difference> dims;
  for (int64_t d = 0; d < a.dim(); ++d) {
    const bool in_a = a.size(d) > 1;
    const bool in_b = b.size(d) > 1;
    if (in_a && in_b && a.stride(d) != b.stride(d)) {
      return true;
    }
    if (in_a || in_b) {
      dims.push_back({in_a ? a.stride(d) : b.stride(d), b.size(d) - 1, a.size(d) - 1});
    }
  }
  std::sort(dims.begin(), dims.end(), [](const Difference& x, const Difference& y) { return x.stride > y.stride; });
  return dims.empty() || dims.back().stride == 0 || reaches(dims, 0, distance / size);
}

}  // namespace

void check_no_overlap(const char* op, const NamedTensor& x) {
  TORCH_CHECK(
      !may_overlap(x.tensor), op, ": expected ", x.name, " whose elements are each a place of their own, got strides ",
      x.tensor.strides(), " for sizes ", x.tensor.sizes(), "; call clone() first");
}

void check_no_overlap(const char* op, const NamedTensor& x, const NamedTensor& y) {
  TORCH_CHECK(
      !may_overlap(x.tensor, y.tensor), op, ": expected ", x.name, " and ", y.name,
      " in memory of their own, got two that overlap");
}

}  // namespace posenc::arguments
