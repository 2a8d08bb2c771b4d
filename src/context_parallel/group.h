#pragma once

#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <string>

// Process groups by name. Operators take the name, because a traced graph can hold a string but no object.
namespace posenc::context_parallel {

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

/// The group that is registered in this process by `name`, or null.
Group find_group(const std::string& name);

/// The name that `group` is registered by: its own name (`torch.distributed` registers all groups of Python), or else
/// one that it is registered by here. LibTorch's registry does not keep the group alive.
/// @throws c10::Error  if `group` is null; `op` is the name of the operator in the message.
std::string name_of_group(const char* op, const Group& group);

}  // namespace posenc::context_parallel
