#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

// Ring communication: blocks of tensors are passed around the ranks of a process group during a computation.
namespace posenc::context_parallel {

/// A block of a tensor that is passed around the ring of ranks. Each `depart` sends it to the next rank and receives
/// the block of the previous rank. The block that was sent can be read until the next `depart`.
class TravellingBlock {
 public:
  /// @param block  the block of this rank, contiguous.
  TravellingBlock(c10::intrusive_ptr<c10d::ProcessGroup> group, at::Tensor block);

  /// The block that this rank holds now: after `depart`, the received one. Waits for the transfer as the backend of the
  /// group does: the host with Gloo, the current stream with NCCL.
  const at::Tensor& here();

  /// Starts to send the block and to receive the next one. Writes into the block must be on the current stream.
  void depart();

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  at::Tensor here_, next_;
  c10::intrusive_ptr<c10d::Work> travelling_;
};

}  // namespace posenc::context_parallel
