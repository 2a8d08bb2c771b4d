#pragma once

#include <posenc/modules/rotary_embedding.h>

#include <torch/types.h>

// The order of the dimensions of inputs, for modules that rotate heads.
namespace posenc::detail {

inline const char* name_of(Layout layout) {
  switch (layout) {
    case Layout::bshd:
      return "bshd";
    case Layout::sbhd:
      return "sbhd";
    case Layout::bhsd:
      return "bhsd";
    case Layout::thd:
      return "thd";
  }
  return "unknown";
}

/// A view of `x` in the order of dimensions of the operators, `[B, S, H, D]` or `[T, H, D]`. It is its own inverse.
inline torch::Tensor reordered(const torch::Tensor& x, Layout layout) {
  switch (layout) {
    case Layout::sbhd:
      return x.transpose(0, 1);
    case Layout::bhsd:
      return x.transpose(1, 2);
    default:
      return x;
  }
}

/// @throws c10::Error  naming `module` and `name` if `x` is undefined or not of the layout and head size of `options`.
inline void check_input(
    const char* module,
    const char* name,
    const torch::Tensor& x,
    const RotaryEmbeddingOptions& options) {
  TORCH_CHECK(x.defined(), module, ": expected ", name, " to be a tensor, got an undefined one");
  const int64_t dims = options.layout() == Layout::thd ? 3 : 4;
  TORCH_CHECK(
      x.dim() == dims && x.size(-1) == options.head_dim(), module, ": expected ", name, " in layout ",
      name_of(options.layout()), " with ", dims, " dimensions and a head size of ", options.head_dim(), ", got ",
      x.sizes());
}

}  // namespace posenc::detail
