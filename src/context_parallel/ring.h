#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <string>

// Blocks of tensors that travel around the ranks of a process group while something is computed from them.
namespace posenc::context_parallel {

/// The group of a call.
/// @throws c10::Error  where there is none.
c10::intrusive_ptr<c10d::ProcessGroup> process_group(
    const char* op,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group);
c10::intrusive_ptr<c10d::ProcessGroup> process_group(const char* op, const std::string& group_name);

/// A block on its way around: each departure takes it to the next rank, while that of the previous rank comes here. The
/// one that was here may be read until the next departure.
class TravellingBlock {
 public:
  /// @param block  contiguous; the first one.
  TravellingBlock(c10::intrusive_ptr<c10d::ProcessGroup> group, at::Tensor block);

  /// The block that is here, or comes after the last departure. Waits for it as the group's backend does: the host with
  /// Gloo, the current stream with NCCL.
  const at::Tensor& here();

  /// Starts to send it, and to receive the next one. All that was written into it must be on the current stream.
  void depart();

 private:
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  at::Tensor here_, next_;
  c10::intrusive_ptr<c10d::Work> travelling_;
};

}  // namespace posenc::context_parallel
