#include "device.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <fstream>
#include <sstream>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#ifdef POSENC_CUDA
#include <ATen/cuda/Sleep.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#endif

namespace posenc::bench {
namespace {

/// Random bytes, because hardware can be faster on constant data.
at::Tensor random_bytes(int64_t count, c10::Device device) {
  return at::empty({count}, at::TensorOptions().dtype(at::kByte).device(device)).random_();
}

/// Model of the processor from /proc/cpuinfo; "CPU" if it is not there.
std::string cpu_model() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const auto colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "CPU";
}

class CpuDevice final : public Device {
 public:
  /// @param reason  why the benchmark does not run on a GPU.
  explicit CpuDevice(std::string reason) : reason_(std::move(reason)) {}

  c10::Device torch_device() const override { return c10::kCPU; }

  std::string description() const override {
    std::ostringstream text;
    text << reason_ << ", smaller configurations on the CPU: " << cpu_model() << ", " << at::get_num_threads()
         << " threads, " << at::get_cpu_capability();
    return text.str();
  }

  std::string clock_description() const override { return "wall time of a call, freed memory kept by the process"; }

  void synchronize() override {}

  double time(const Work& work) override {
    const double start = now();
    work();
    return now() - start;
  }

  std::optional<int64_t> peak_memory(const Work& /*work*/) override { return std::nullopt; }

  // The copy allocates its result, as the operators do.
  Work make_copy(int64_t bytes) override {
    return [source = random_bytes(bytes, torch_device())] { source.clone(); };
  }

  // The fill allocates its result too.
  Work make_fill(int64_t bytes) override {
    return [bytes] { at::full({bytes}, 1, at::kByte); };
  }

  void release_memory() override {}

 private:
  std::string reason_;
};

#ifdef POSENC_CUDA

/// 13000 as "13.0", the way CUDA numbers its versions.
std::string cuda_version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

/// Version of the driver such as "580.95.05"; empty if NVML is not available. NVML is loaded at run time because it
/// comes with the driver: a program linked against it would not start without a driver.
std::string nvml_driver_version() {
  void* nvml = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (nvml == nullptr) {
    return "";
  }
  const auto init = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlInit_v2"));
  const auto shutdown = reinterpret_cast<int (*)()>(dlsym(nvml, "nvmlShutdown"));
  const auto get_version = reinterpret_cast<int (*)(char*, unsigned int)>(dlsym(nvml, "nvmlSystemGetDriverVersion"));
  std::array<char, 80> version{};  // NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
  if (init != nullptr && shutdown != nullptr && get_version != nullptr && init() == 0) {
    if (get_version(version.data(), static_cast<unsigned int>(version.size())) != 0) {
      version[0] = '\0';
    }
    shutdown();
  }
  dlclose(nvml);
  return version.data();
}

std::string driver_version() {
  std::string version = nvml_driver_version();
  if (!version.empty()) {
    return version;
  }
  int number = 0;
  C10_CUDA_CHECK(cudaDriverGetVersion(&number));
  return "for CUDA " + cuda_version(number);
}

class Event {
 public:
  Event() { C10_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { C10_CUDA_CHECK(cudaEventRecord(event_, stream)); }

  bool reached() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) {
      cudaGetLastError();  // clears cudaErrorNotReady, which the next check would report
      return false;
    }
    C10_CUDA_CHECK(status);
    return true;
  }

  void wait() const { C10_CUDA_CHECK(cudaEventSynchronize(event_)); }

  /// Seconds from `start` to this event, both reached.
  double seconds_since(const Event& start) const {
    float milliseconds = 0;
    C10_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, start.event_, event_));
    return milliseconds * 1e-3;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaDevice final : public Device {
 public:
  CudaDevice() {
    C10_CUDA_CHECK(cudaGetDevice(&index_));
    // Twice the size of L2: its replacement is not strictly LRU, so writing the size once leaves old lines.
    const int64_t flush_bytes = 2 * static_cast<int64_t>(attribute(cudaDevAttrL2CacheSize));
    flush_buffer_ = at::empty({flush_bytes}, at::TensorOptions().dtype(at::kByte).device(torch_device()));
    cycles_per_second_ = 1e3 * attribute(cudaDevAttrClockRate);  // the attribute is in kHz
    wake_up();
  }

  c10::Device torch_device() const override { return c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index_)); }

  std::string description() const override {
    cudaDeviceProp properties{};
    C10_CUDA_CHECK(cudaGetDeviceProperties(&properties, index_));
    int runtime = 0;
    C10_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
    std::ostringstream text;
    text << properties.name << " (" << properties.multiProcessorCount << " multiprocessors, "
         << (properties.totalGlobalMem >> 30) << " GiB, L2 " << (properties.l2CacheSize >> 20) << " MiB), driver "
         << driver_version() << ", CUDA run time " << cuda_version(runtime);
    return text.str();
  }

  std::string clock_description() const override {
    return "device time of a call between CUDA events, L2 flushed before each";
  }

  void synchronize() override { C10_CUDA_CHECK(cudaDeviceSynchronize()); }

  // A delay on the device keeps the timed region from starting before the host has enqueued all of `work`. The time is
  // then that of the kernels back to back: formulations of many small kernels do not pay for the host's launches. If
  // the device reaches the region too early, the sample is taken again. The delay depends on the last enqueue time
  // only, so that one disturbed sample does not slow down all later ones.
  double time(const Work& work) override {
    // Work that synchronises with the device takes longer than any delay. Each attempt about doubles the delay, so
    // all of them together take a fraction of a second.
    constexpr int kAttempts = 10;
    const cudaStream_t stream = current_stream();
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      flush();
      delay();
      start_.record(stream);
      const double enqueue_start = now();
      work();
      stop_.record(stream);
      const bool enqueued_in_time = !start_.reached();
      enqueue_seconds_ = now() - enqueue_start;
      stop_.wait();
      if (enqueued_in_time) {
        return stop_.seconds_since(start_);
      }
    }
    TORCH_CHECK(false, "the work could not be enqueued before the device reached it: does it wait for the device?");
  }

  std::optional<int64_t> peak_memory(const Work& work) override {
    namespace allocator = c10::cuda::CUDACachingAllocator;
    work();  // in their first call libraries allocate memory that they keep
    const auto device = static_cast<c10::DeviceIndex>(index_);
    const auto allocated = [device] {
      return allocator::getDeviceStats(device)
          .allocated_bytes[static_cast<std::size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
    };
    const int64_t before = allocated().current;
    allocator::resetPeakStats(device);
    work();
    return allocated().peak - before;
  }

  Work make_copy(int64_t bytes) override {
    at::Tensor source = random_bytes(bytes, torch_device());
    at::Tensor destination = at::empty_like(source);
    return [source, destination] {
      C10_CUDA_CHECK(cudaMemcpyAsync(
          destination.mutable_data_ptr(), source.const_data_ptr(), source.nbytes(), cudaMemcpyDeviceToDevice,
          current_stream()));
    };
  }

  Work make_fill(int64_t bytes) override {
    at::Tensor destination = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(torch_device()));
    return [destination] {
      C10_CUDA_CHECK(cudaMemsetAsync(destination.mutable_data_ptr(), 1, destination.nbytes(), current_stream()));
    };
  }

  void release_memory() override { c10::cuda::CUDACachingAllocator::emptyCache(); }

 private:
  static cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }

  void flush() { flush_buffer_.fill_(1); }

  /// Delays the stream by twice the last enqueue time, and by at least 100 us, which hides the host's usual jitter.
  void delay() const {
    constexpr double kShortest = 100e-6;
    at::cuda::sleep(static_cast<int64_t>(std::max(kShortest, 2 * enqueue_seconds_) * cycles_per_second_));
  }

  /// Keeps the device busy for 0.5 s, so that an idle GPU raises its clocks. No GPU tried took longer.
  void wake_up() {
    const double end = now() + 0.5;
    while (now() < end) {
      flush();
      synchronize();
    }
  }

  int index_ = 0;
  at::Tensor flush_buffer_;
  double cycles_per_second_ = 0;
  double enqueue_seconds_ = 0;
  Event start_;
  Event stop_;
};

#endif  // POSENC_CUDA

}  // namespace

void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);         // no block by mmap, which free() would unmap
  mallopt(M_TRIM_THRESHOLD, -1);  // free() does not shrink the heap
#endif
}

double wall_time(Device& device, const Work& work) {
  device.synchronize();
  const double start = now();
  work();
  device.synchronize();
  return now() - start;
}

Timing time_step(Device& device, const Step& step, Pass pass) {
  return measure([&] {
    step.clear();
    switch (pass) {
      case Pass::forward:
        return wall_time(device, step.forward);
      case Pass::backward:
        step.forward();
        return wall_time(device, step.backward);
      case Pass::total:
        break;
    }
    return wall_time(device, [&] {
      step.forward();
      step.backward();
    });
  });
}

std::unique_ptr<Device> make_device() {
#ifdef POSENC_CUDA
  if (at::hasCUDA() && at::getNumGPUs() > 0) {
    return std::make_unique<CudaDevice>();
  }
  return std::make_unique<CpuDevice>("No CUDA device");
#else
  return std::make_unique<CpuDevice>("Built without CUDA");
#endif
}

}  // namespace posenc::bench
