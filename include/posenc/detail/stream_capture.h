#pragma once

#include <posenc/export.h>

#include <c10/core/Device.h>

namespace posenc::detail {

/// Whether the current stream of `device` is being captured into a CUDA graph. Memory that captured kernels read must
/// stay allocated during the lifetime of the graph. False on other devices than CUDA.
POSENC_API bool is_capturing(const c10::Device& device);

}  // namespace posenc::detail
