#include <context_parallel/ring.h>
#include <detail/torch_compat.h>

#include <ATen/ops/empty_like.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include <utility>
#include <vector>

namespace posenc::context_parallel {

using at::Tensor;
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

Group process_group(const char* op, const Group& group) {
  TORCH_CHECK(group.defined(), op, ": expected group to be a process group, got none");
  return group;
}

Group process_group(const char* op, const std::string& group_name) {
  try {
    return c10d::resolve_process_group(group_name);
  } catch (const c10::Error&) {
    TORCH_CHECK(
        false, op, ": expected group_name to be the name of a registered process group, got \"", group_name, "\"");
  }
}

TravellingBlock::TravellingBlock(Group group, Tensor block) : group_(std::move(group)), here_(std::move(block)) {
}

const Tensor& TravellingBlock::here() {
  if (travelling_.defined()) {
    travelling_->wait();
    travelling_.reset();
    std::swap(here_, next_);
  }
  return here_;
}

void TravellingBlock::depart() {
  here();
  const int size = group_->getSize();
  if (!next_.defined()) {
    next_ = at::empty_like(here_);
  }
  // Everything to the next rank and everything from the previous one, in one call: a send and a receive of their own
  // would need an order that does not deadlock, which differs between backends.
  Tensor to = next_.view(-1);
  Tensor from = here_.view(-1);
  std::vector<int64_t> received(size, 0);
  std::vector<int64_t> sent(size, 0);
  const int rank = group_->getRank();
  received[(rank + size - 1) % size] = to.numel();
  sent[(rank + 1) % size] = from.numel();
  travelling_ = all_to_all_single(*group_, to, from, received, sent);
}

}  // namespace posenc::context_parallel
