#include <posenc/detail/stream_capture.h>

#if POSENC_CUDA
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#endif

namespace posenc::detail {

bool is_capturing(const c10::Device& device) {
#if POSENC_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  }
#endif
  static_cast<void>(device);
  return false;
}

}  // namespace posenc::detail
