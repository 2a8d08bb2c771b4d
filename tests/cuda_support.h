#pragma once

#include "support.h"

#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cuda_runtime_api.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

/// Helpers for tests of CUDA graphs, memory and streams. Includes CUDA headers.
namespace posenc::test {

/// GPU clock cycles: half a second at 2 GHz.
constexpr int64_t kLongSleep = 1'000'000'000;

/// Reason why a test that needs so many gigabytes (1e9 bytes) of GPU memory cannot run; empty if it can.
inline std::string too_large(double gigabytes) {
  if (env_int("POSENC_TEST_SMALL", 0) != 0) {
    return "POSENC_TEST_SMALL is set";
  }
  size_t free = 0;
  size_t total = 0;
  C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const double available = static_cast<double>(free) / 1e9;
  return available < gigabytes ? c10::str("needs ", gigabytes, " GB of GPU memory, ", available, " GB are free") : "";
}

/// Skips the running test if torch's caching allocator is disabled, as it is under compute-sanitizer: every allocation
/// then waits for the GPU. Call it from `SetUp`.
inline void require_caching_allocator() {
  if (!::testing::Test::IsSkipped() && !::testing::Test::HasFatalFailure() &&
      env_int("PYTORCH_NO_CUDA_MEMORY_CACHING", 0) != 0) {
    GTEST_SKIP() << "PYTORCH_NO_CUDA_MEMORY_CACHING is set";
  }
}

/// Captures the GPU work of `action` into `graph`, on a stream from the pool.
inline void capture(at::cuda::CUDAGraph& graph, const std::function<void()>& action) {
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
  // The first call loads kernels and allocates memory, which must happen outside of the capture.
  action();
  c10::cuda::device_synchronize();
  graph.capture_begin();
  action();
  graph.capture_end();
}

using NodeCounts = std::map<cudaGraphNodeType, int>;

/// Number of graph nodes of each type in a capture of `action`.
inline NodeCounts recorded_nodes(const std::function<void()>& action) {
  at::cuda::CUDAGraph graph(/*keep_graph=*/true);
  capture(graph, action);
  size_t count = 0;
  C10_CUDA_CHECK(cudaGraphGetNodes(graph.raw_cuda_graph(), nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  C10_CUDA_CHECK(cudaGraphGetNodes(graph.raw_cuda_graph(), nodes.data(), &count));
  NodeCounts counts;
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    C10_CUDA_CHECK(cudaGraphNodeGetType(node, &type));
    ++counts[type];
  }
  return counts;
}

}  // namespace posenc::test
