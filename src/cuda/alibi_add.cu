#include <cuda/detail/dispatch.h>
#include <cuda/detail/vector_width.h>
#include <cuda/kernels.h>
#include <cuda/alibi_add_kernel.cuh>

// Launches of alibi_bias, alibi_add and alibi_mask, which are passes of one kernel.
namespace posenc::cuda {
namespace {

template <typename T, typename Policy>
void launch_alibi_add(const AlibiAddProblem& problem) {
  const AlibiShape& shape = problem.shape;
  constexpr int U = Policy::kVectorsPerThread;
  const int64_t num_vectors = ceil_div(shape.k_len, Policy::kVectorWidth);
  const int64_t along_keys = threads_along_keys(num_vectors, U);
  const int64_t along_queries = kMaxThreads / along_keys;
  const int64_t key_groups = ceil_div(num_vectors, along_keys * U);
  // A grid has at most 2^31 - 1 blocks. 2^31 blocks for one matrix [Sq, Sk] would be 2^40 elements, which fit no
  // memory.
  const int64_t blocks = key_groups * ceil_div(shape.q_len, along_queries);
  const Matrices matrices(shape);
  const dim3 block(along_keys, along_queries);
  alibi_add_kernel<T, Policy><<<matrices.grid(blocks), block, 0, current_stream()>>>(
      problem, matrices, Divider(static_cast<uint32_t>(key_groups)));
  check_launch();
}

/// Launches the kernel of one pass. Each thread loads and stores 16 bytes at a time where addresses and strides of the
/// scores and the output are multiples of 16 bytes, else one element at a time.
template <AlibiPass Pass>
void run_alibi_add(const AlibiAddProblem& problem, DType dtype) {
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
        launch_alibi_add<T, AlibiPolicy<V, Pass, kCausal>>(problem);
      } else {
        launch_alibi_add<T, AlibiPolicy<1, Pass, kCausal>>(problem);
      }
    });
  });
}

}  // namespace

void alibi_bias(const AlibiAddProblem& problem, DType dtype) {
  run_alibi_add<AlibiPass::bias>(problem, dtype);
}

void alibi_add(const AlibiAddProblem& problem, DType dtype) {
  run_alibi_add<AlibiPass::add>(problem, dtype);
}

void alibi_mask(const AlibiAddProblem& problem, DType dtype) {
  run_alibi_add<AlibiPass::mask>(problem, dtype);
}

}  // namespace posenc::cuda
