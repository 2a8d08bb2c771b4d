#pragma once

#include <torch/types.h>

namespace posenc::detail {

/// `device` as tensors report it, with an index: `cuda` becomes the current CUDA device.
inline torch::Device resolved(const torch::Device& device) {
  return device.has_index() || device.is_cpu() ? device : torch::empty({0}, device).device();
}

}  // namespace posenc::detail
