#pragma once

#include "timing.h"

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

// The device of the benchmark and its clock. Only device.cpp calls the CUDA runtime.
namespace posenc::bench {

/// The function to time. On a GPU it enqueues to the current stream and must not synchronise with it.
using Work = std::function<void()>;

class Device {
 public:
  virtual ~Device() = default;

  /// Device of the benchmark's tensors.
  virtual c10::Device torch_device() const = 0;

  /// One line: the device, and the versions of its driver and of the CUDA runtime.
  virtual std::string description() const = 0;

  /// One line that says how `time` measures.
  virtual std::string clock_description() const = 0;

  /// Waits for all enqueued work.
  virtual void synchronize() = 0;

  /// Seconds that the device spends on `work`. On a GPU the L2 cache is flushed first.
  virtual double time(const Work& work) = 0;

  /// Peak of the bytes that LibTorch has allocated during `work`, minus those allocated before it. Runs `work` twice.
  /// On a CPU it returns nullopt and does not run `work`.
  virtual std::optional<int64_t> peak_memory(const Work& work) = 0;

  /// One contiguous copy of `bytes` bytes between two buffers on the device. It bounds the speed of an operator that
  /// reads and writes as many bytes.
  virtual Work make_copy(int64_t bytes) = 0;

  /// Sets `bytes` bytes of one buffer to one value. It bounds the speed of an operator that only writes as many bytes.
  virtual Work make_fill(int64_t bytes) = 0;

  /// Frees cached memory that is not in use, so that the next case can allocate it.
  virtual void release_memory() = 0;
};

/// Makes malloc keep freed memory, as LibTorch's caching allocator for GPUs does. By default glibc returns blocks above
/// 32 MB to the system, and an operator that writes more than that spends most of its time on page faults.
void keep_freed_memory();

/// Seconds of `work` on the host's clock, with the device synchronised before and after.
double wall_time(Device& device, const Work& work);

/// The parts of a training step. `clear`, which is not timed, frees results and gradients of the step before.
struct Step {
  Work clear, forward, backward;
};

/// Wall time of the forward pass, of the backward pass after a fresh forward one, or of both with no synchronisation
/// between them.
Timing time_step(Device& device, const Step& step, Pass pass);

/// The current CUDA device where there is one and posenc was built with CUDA, otherwise the CPU.
std::unique_ptr<Device> make_device();

}  // namespace posenc::bench
