#pragma once

#include <posenc/export.h>

#include <c10/core/Device.h>

namespace posenc::detail {

/// Whether work that is issued now on the current stream of `device` is captured into a graph instead of being run.
/// Memory that it reads must then stay as long as the graph does. False on devices without graphs.
POSENC_API bool is_capturing(const c10::Device& device);

}  // namespace posenc::detail
