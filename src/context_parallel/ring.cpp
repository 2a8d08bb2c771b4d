#include <context_parallel/ring.h>
#include <detail/torch_compat.h>

#include <ATen/ops/empty_like.h>

#include <utility>
#include <vector>

namespace posenc::context_parallel {

using at::Tensor;
using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

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
  // One all-to-all that sends all elements to the next rank and receives all from the previous one. A separate send and
  // receive would need an order that does not deadlock, and that order differs between backends.
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
