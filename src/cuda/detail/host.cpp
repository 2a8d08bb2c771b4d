#include <cuda/detail/host.h>

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace posenc::cuda {

void fail(const std::string& message) {
  TORCH_CHECK(false, message);
}

void check(cudaError_t status) {
  C10_CUDA_CHECK(status);
}

cudaStream_t current_stream() {
  return c10::cuda::getCurrentCUDAStream();
}

std::shared_ptr<void> allocate(int64_t bytes) {
  const auto memory = std::make_shared<c10::DataPtr>(c10::cuda::CUDACachingAllocator::get()->allocate(bytes));
  return {memory, memory->get()};
}

}  // namespace posenc::cuda
