#include <context_parallel/group.h>

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <mutex>

namespace posenc::context_parallel {

Group find_group(const std::string& name) {
  try {
    return c10d::resolve_process_group(name);
  } catch (const c10::Error&) {
    return {};  // the registry has no function that asks without throwing
  }
}

std::string name_of_group(const char* op, const Group& group) {
  TORCH_CHECK(group.defined(), op, ": expected group to be a process group, got none");
  // A group without a backend has no name.
  if (!group->getDeviceTypes().empty()) {
    const std::string& name = group->getGroupName();
    if (find_group(name) == group) {
      return name;
    }
  }
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  std::string name = c10::str("posenc.group.", static_cast<const void*>(group.get()));
  if (find_group(name) != group) {
    c10d::unregister_process_group(name);  // of a group that was destroyed, at the same address
    c10d::register_process_group(name, group);
  }
  return name;
}

}  // namespace posenc::context_parallel
