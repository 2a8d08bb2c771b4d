#pragma once

#include <cuda/detail/dispatch.h>
#include <cuda/detail/vector_width.h>
#include <cuda/alibi_add_kernel.cuh>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace posenc::cuda {

template <typename T, typename Policy>
void launch_alibi_add(const char* op, const AlibiAddProblem& problem) {
  const AlibiShape& shape = problem.shape;
  constexpr int U = Policy::kVectorsPerThread;
  const int64_t num_vectors = ceil_div(shape.k_len, Policy::kVectorWidth);
  const int64_t along_keys = threads_along_keys(num_vectors, U);
  const int64_t along_queries = kMaxThreads / along_keys;
  const int64_t key_groups = ceil_div(num_vectors, along_keys * U);
  const int64_t blocks = key_groups * ceil_div(shape.q_len, along_queries);
  TORCH_CHECK(
      fits_grid(blocks, shape), op, ": expected at most ", kMaxGridX, " blocks of ", along_queries, " queries and ",
      along_keys * U * Policy::kVectorWidth, " keys, and ", kMaxGridY, " heads and batches on CUDA, got ", blocks, ", ",
      shape.num_heads, " and ", shape.batch);
  const dim3 grid(blocks, shape.num_heads, shape.batch);
  const dim3 block(along_keys, along_queries);
  alibi_add_kernel<T, Policy>
      <<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(problem, Divider(static_cast<uint32_t>(key_groups)));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

/// Launches with 16-byte vectors where the call allows them, else with single elements.
template <AlibiPass Pass>
void run_alibi_add(const char* op, const AlibiAddProblem& problem, at::ScalarType dtype) {
  if (is_empty(problem.shape)) {
    return;
  }
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = kMaxVectorBytes / sizeof(T);
    const int32_t k_len = problem.shape.k_len;
    const bool vectors = holds_vectors<T, V>(problem.out.data, problem.out.strides, k_len) &&
        (Pass == AlibiPass::bias || holds_vectors<T, V>(problem.in.data, problem.in.strides, k_len));
    for_bool(problem.shape.causal, [&](auto causal) {
      constexpr bool kCausal = decltype(causal)::value || Pass == AlibiPass::mask;
      if (vectors) {
        launch_alibi_add<T, AlibiPolicy<V, Pass, kCausal>>(op, problem);
      } else {
        launch_alibi_add<T, AlibiPolicy<1, Pass, kCausal>>(op, problem);
      }
    });
  });
}

}  // namespace posenc::cuda
