#pragma once

#ifdef USE_DISTRIBUTED
#include <c10/core/DeviceType.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <functional>

// Process groups whose ranks are threads of this process.
namespace posenc::test {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

/// A group without a backend.
Group group_of(int size);

/// Calls `body(group)` in a thread for each rank. On a GPU all ranks use one device and its default stream. LibTorch
/// runs the backward passes of a GPU in one thread, so those of several ranks would wait for each other: call the
/// backward operator instead.
void for_each_rank(int size, at::DeviceType device, const std::function<void(const Group&)>& body);

}  // namespace posenc::test
#endif
