#pragma once

#include "timing.h"

#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

// Where the benchmark runs and how time is taken there. The only place of the benchmark that knows CUDA.
namespace posenc::bench {

/// Something to be timed. On a GPU it enqueues to the current stream and must not wait for it.
using Work = std::function<void()>;

class Device {
 public:
  virtual ~Device() = default;

  /// Where the tensors of the benchmark live.
  virtual c10::Device torch_device() const = 0;

  /// The device, its driver and its run time, in one line.
  virtual std::string description() const = 0;

  /// How `time` measures, in words.
  virtual std::string clock_description() const = 0;

  /// Waits until everything that was enqueued is done.
  virtual void synchronize() = 0;

  /// Seconds that the device spends on `work`, starting with cold caches where the device can be made to.
  virtual double time(const Work& work) = 0;

  /// Most bytes of the device's memory that `work` holds at one time beyond what is held before it; nothing where that
  /// cannot be told. Where it can, the work is done twice.
  virtual std::optional<int64_t> peak_memory(const Work& work) = 0;

  /// One contiguous copy of `bytes` bytes from one buffer to another, both on the device: the speed that no operator
  /// which reads and writes as much can be expected to exceed.
  virtual Work make_copy(int64_t bytes) = 0;

  /// Sets `bytes` bytes of one buffer to one value: the speed that no operator which only writes as much can be
  /// expected to exceed.
  virtual Work make_fill(int64_t bytes) = 0;

  /// Returns memory that is cached but not in use, so that one case does not take it from the next.
  virtual void release_memory() = 0;
};

/// Makes the host's heap keep the memory that is returned to it, as LibTorch's allocator for GPUs does, instead of
/// giving blocks above 32 MB back to the system. Without it most of the time of an operator that writes more than that
/// goes into the first touch of new pages, and the measurement is one of the system.
void keep_freed_memory();

/// Seconds on the host's clock from the start of `work`, with an idle device, until the device is idle again.
double wall_time(Device& device, const Work& work);

/// A step of training in its parts. `clear` drops what the step before has left, off the clock.
struct Step {
  Work clear, forward, backward;
};

/// Wall time of the forward pass, of the backward pass after a fresh forward one, or of both with no synchronisation
/// between them.
Timing time_step(Device& device, const Step& step, Pass pass);

/// The current CUDA device where there is one and posenc was built with CUDA, otherwise the CPU.
std::unique_ptr<Device> make_device();

}  // namespace posenc::bench
