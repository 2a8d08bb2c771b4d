#pragma once

#include <torch/types.h>

namespace posenc::detail {

/// The device that a tensor would report: `cuda` becomes the current device.
inline torch::Device resolved(const torch::Device& device) {
  return device.has_index() || device.is_cpu() ? device : torch::empty({0}, device).device();
}

}  // namespace posenc::detail
