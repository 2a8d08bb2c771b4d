#pragma once

#include <torch/types.h>

namespace posenc::detail {

/// A device as tensors report it: `cuda` is the current one.
inline torch::Device resolved(const torch::Device& device) {
  return device.has_index() || device.is_cpu() ? device : torch::empty({0}, device).device();
}

}  // namespace posenc::detail
