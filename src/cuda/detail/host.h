#pragma once

#include <posenc/logging.h>

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <sstream>
#include <string>

// Functions of LibTorch for the host code of kernels, declared without its headers. nvcc parses a source once for each
// GPU architecture: ATen/core/Tensor.h and c10/cuda take 21 s of processor time in each source of a release build with
// six architectures, these declarations less than 1 s.
namespace posenc::cuda {

/// The dtype of the elements of a tensor.
enum class DType : uint8_t { float16, bfloat16, float32, float64 };

/// Concatenates the arguments as text.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// @throws c10::Error  with this message.
[[noreturn]] void fail(const std::string& message);

/// @throws c10::Error  with the text of `message` if `condition` is false.
template <typename... Parts>
void check(bool condition, const Parts&... message) {
  if (!condition) {
    fail(text(message...));
  }
}

/// @throws c10::Error  if `status` is an error of the CUDA runtime.
void check(cudaError_t status);

/// Call it after each kernel launch. @throws c10::Error  if the launch failed.
inline void check_launch() {
  check(cudaGetLastError());
}

/// LibTorch's current stream of the current device.
cudaStream_t current_stream();

/// Memory of the current device from LibTorch's caching allocator. It is freed with the last copy of the pointer; like
/// the memory of a tensor, it is reused only by later work on the current stream.
std::shared_ptr<void> allocate(int64_t bytes);

/// Logs the text of `message` for debugging; its parts are formatted only if this level is on.
template <typename... Parts>
void log_debug(const Parts&... message) {
  if (log_level() <= LogLevel::debug) {
    log(LogLevel::debug, text(message...));
  }
}

}  // namespace posenc::cuda
