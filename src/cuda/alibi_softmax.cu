#include <cuda/detail/dispatch.h>
#include <cuda/detail/vector_width.h>
#include <cuda/kernels.h>
#include <cuda/alibi_softmax_backward_kernel.cuh>
#include <cuda/alibi_softmax_kernel.cuh>

#include <algorithm>

namespace posenc {
namespace {

/// Elements of a row that one thread keeps in registers. With many, a larger share of the registers holds data, and
/// fewer warps wait at a barrier. Time relative to a copy of the same bytes, forward in bfloat16 with causal mask, rows
/// of 2,048, 4,096 and 8,192, measured on an H100: 0.78, 0.78 and 0.77 with 32 elements, 0.80, 0.80 and 0.83 with 16,
/// 0.92 and 0.96 with 8, 0.79, 0.79 and 0.78 with 64. In float32 all take 0.77 to 0.79. The backward pass keeps two
/// tensors, and `kFew` elements of rows up to 4,096.
constexpr int kFew = 16;
constexpr int kMany = 32;
constexpr int64_t kFewThreads = 256;

/// The threads of a block, whole warps, for one or several rows.
dim3 row_block(const AlibiShape& shape, int64_t per_thread) {
  const int64_t threads =
      std::min<int64_t>(cuda::kMaxRowThreads, cuda::ceil_div(shape.k_len, per_thread * cuda::kWarp) * cuda::kWarp);
  return dim3(threads, std::max<int64_t>(1, cuda::kMaxThreads / threads));
}

/// Launches one of the kernels of this source.
template <typename Problem>
void launch_rows(
    void (*kernel)(Problem, cuda::Matrices),
    const Problem& problem,
    const dim3& block,
    size_t shared_bytes = 0) {
  const cuda::Matrices matrices(problem.shape);
  const dim3 grid = matrices.grid(cuda::ceil_div(problem.shape.q_len, block.y));
  kernel<<<grid, block, shared_bytes, cuda::current_stream()>>>(problem, matrices);
  cuda::check_launch();
}

template <typename T, int V>
void run(const AlibiSoftmaxProblem& problem) {
  const dim3 block = row_block(problem.shape, kMany);
  if (problem.shape.k_len > kMany * cuda::kMaxRowThreads) {
    launch_rows(cuda::alibi_softmax_long_kernel<T, V>, problem, block);
    return;
  }
  cuda::for_bool(problem.shape.causal, [&](auto causal) {
    launch_rows(cuda::alibi_softmax_kernel<T, cuda::RowPolicy<V, kMany / V, decltype(causal)::value>>, problem, block);
  });
}

template <typename T, int V, int E>
void launch(const AlibiSoftmaxBackwardProblem& problem) {
  // Only float32 is staged in shared memory: float16 and bfloat16 stay packed in registers. Single elements cannot be.
  constexpr bool kStaged = E == kMany && sizeof(T) == 4 && V > 1;
  const dim3 block = row_block(problem.shape, E);
  const size_t shared_bytes = kStaged ? size_t{block.x} * block.y * E * sizeof(T) : 0;
  cuda::for_bool(problem.shape.causal, [&](auto causal) {
    cuda::for_bool(problem.row_sums != nullptr, [&](auto slopes_grad) {
      using Policy = cuda::RowPolicy<V, E / V, decltype(causal)::value>;
      const auto kernel = cuda::alibi_softmax_backward_kernel<T, Policy, kStaged, decltype(slopes_grad)::value>;
      if (kStaged) {
        constexpr int kMaxStagedBytes = cuda::kMaxRowThreads * E * static_cast<int>(sizeof(T));
        cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxStagedBytes));
      }
      launch_rows(kernel, problem, block, shared_bytes);
    });
  });
}

template <typename T, int V>
void run(const AlibiSoftmaxBackwardProblem& problem) {
  const int32_t k_len = problem.shape.k_len;
  constexpr bool kKeepsMany = sizeof(T) < 8;  // two arrays of 32 float64 do not fit the registers of a thread
  if (k_len <= kFew * kFewThreads || (!kKeepsMany && k_len <= kFew * cuda::kMaxRowThreads)) {
    launch<T, V, kFew>(problem);
  } else if (kKeepsMany && k_len <= kMany * cuda::kMaxRowThreads) {
    launch<T, V, kKeepsMany ? kMany : kFew>(problem);
  } else {
    cuda::for_bool(problem.row_sums != nullptr, [&](auto slopes_grad) {
      const auto kernel = cuda::alibi_softmax_backward_long_kernel<T, V, decltype(slopes_grad)::value>;
      launch_rows(kernel, problem, row_block(problem.shape, kMany));
    });
  }
}

/// Launches with 16-byte vectors if all tensors of the call allow them, else with single elements.
template <typename T, typename Problem, typename... Scores>
void run_widest(const Problem& problem, const Scores&... scores) {
  constexpr int V = cuda::kMaxVectorBytes / sizeof(T);
  const int32_t k_len = problem.shape.k_len;
  if ((cuda::holds_vectors<T, V>(scores.data, scores.strides, k_len) && ...)) {
    run<T, V>(problem);
  } else {
    run<T, 1>(problem);
  }
}

}  // namespace

void cuda::alibi_softmax(const AlibiSoftmaxProblem& problem, DType dtype) {
  if (cuda::is_empty(problem.shape)) {
    return;
  }
  cuda::for_dtype(
      dtype, [&](auto type) { run_widest<typename decltype(type)::type>(problem, problem.in, problem.out); });
}

void cuda::alibi_softmax_backward(const AlibiSoftmaxBackwardProblem& problem, DType dtype) {
  const AlibiShape& shape = problem.shape;
  cuda::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (!cuda::is_empty(shape)) {
      run_widest<T>(problem, problem.grad, problem.probs, problem.out);
    }
    if (problem.slopes != nullptr && shape.num_heads > 0) {
      using Real = cuda::arithmetic_t<T>;
      const int64_t rows = cuda::is_empty(shape) ? 0 : shape.batch * shape.q_len;
      cuda::sum_of_heads_kernel<Real><<<dim3(shape.num_heads), cuda::kHeadSumThreads, 0, cuda::current_stream()>>>(
          problem.row_sums, rows, static_cast<Real*>(problem.slopes));
      cuda::check_launch();
    }
  });
}

}  // namespace posenc
