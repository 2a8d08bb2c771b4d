#include <contract/alibi.h>
#include <cuda/detail/dispatch.h>
#include <cuda/detail/vector_width.h>
#include <cuda/alibi_softmax_kernel.cuh>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

/// Elements of a row that one thread keeps: few for short rows, so that many threads share the work; many for long
/// ones, so that registers hold more data for each that does the arithmetic.
constexpr int kFew = 16;
constexpr int kMany = 32;
constexpr int64_t kFewThreads = 256;

/// Blocks of one or several rows, of whole warps.
struct RowLaunch {
  dim3 grid, block;
};

RowLaunch row_launch(const char* op, const AlibiShape& shape, int64_t per_thread) {
  const int64_t threads =
      std::min<int64_t>(cuda::kMaxRowThreads, cuda::ceil_div(shape.k_len, per_thread * cuda::kWarp) * cuda::kWarp);
  const int64_t rows = std::max<int64_t>(1, cuda::kMaxThreads / threads);
  const int64_t blocks = cuda::ceil_div(shape.q_len, rows);
  TORCH_CHECK(
      cuda::fits_grid(blocks, shape), op, ": expected at most ", cuda::kMaxGridY, " heads and batches on CUDA, got ",
      shape.num_heads, " and ", shape.batch);
  return {dim3(blocks, shape.num_heads, shape.batch), dim3(threads, rows)};
}

template <typename T, int V, int E>
void launch(const char* op, const AlibiSoftmaxProblem& problem) {
  const auto [grid, block] = row_launch(op, problem.shape, E);
  cuda::for_bool(problem.shape.causal, [&, &grid = grid, &block = block](auto causal) {
    cuda::alibi_softmax_kernel<T, cuda::RowPolicy<V, E / V, decltype(causal)::value>>
        <<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(problem);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <typename T, int V>
void run(const char* op, const AlibiSoftmaxProblem& problem) {
  const int32_t k_len = problem.shape.k_len;
  if (k_len <= kFew * kFewThreads) {
    launch<T, V, kFew>(op, problem);
  } else if (k_len <= kMany * cuda::kMaxRowThreads) {
    launch<T, V, kMany>(op, problem);
  } else {
    const auto [grid, block] = row_launch(op, problem.shape, kMany);
    cuda::alibi_softmax_long_kernel<T, V><<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(problem);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

template <typename T, int V, int E>
void launch(const char* op, const AlibiSoftmaxBackwardProblem& problem) {
  // Half and bfloat16 stay packed in registers, and single elements cannot be staged.
  constexpr bool kStaged = E == kMany && sizeof(T) == 4 && V > 1;
  const auto [grid, block] = row_launch(op, problem.shape, E);
  const size_t shared = kStaged ? size_t{block.x} * block.y * E * sizeof(T) : 0;
  cuda::for_bool(problem.shape.causal, [&, &grid = grid, &block = block](auto causal) {
    const auto kernel =
        cuda::alibi_softmax_backward_kernel<T, cuda::RowPolicy<V, E / V, decltype(causal)::value>, kStaged>;
    if (kStaged) {
      C10_CUDA_CHECK(cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, cuda::kMaxRowThreads * E * static_cast<int>(sizeof(T))));
    }
    kernel<<<grid, block, shared, c10::cuda::getCurrentCUDAStream()>>>(problem);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <typename T, int V>
void run(const char* op, const AlibiSoftmaxBackwardProblem& problem) {
  const int32_t k_len = problem.shape.k_len;
  constexpr bool kKeepsMany = sizeof(T) < 8;  // two of 32 float64 do not fit a thread
  if (k_len <= kFew * kFewThreads || (!kKeepsMany && k_len <= kFew * cuda::kMaxRowThreads)) {
    launch<T, V, kFew>(op, problem);
  } else if (kKeepsMany && k_len <= kMany * cuda::kMaxRowThreads) {
    launch<T, V, kKeepsMany ? kMany : kFew>(op, problem);
  } else {
    const auto [grid, block] = row_launch(op, problem.shape, kMany);
    cuda::alibi_softmax_backward_long_kernel<T, V><<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(problem);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

/// Launches with 16-byte vectors where all tensors of the call allow them, else with single elements.
template <typename Problem, typename... Scores>
void run_widest(const char* op, at::ScalarType dtype, const Problem& problem, const Scores&... scores) {
  cuda::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int V = cuda::kMaxVectorBytes / sizeof(T);
    const int32_t k_len = problem.shape.k_len;
    if ((cuda::holds_vectors<T, V>(scores.data, scores.strides, k_len) && ...)) {
      run<T, V>(op, problem);
    } else {
      run<T, 1>(op, problem);
    }
  });
}

Tensor alibi_softmax_cuda(
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<int64_t> query_offset) {
  constexpr const char* kOp = "posenc::alibi_softmax";
  auto problem = contract::alibi_softmax_problem({kOp, causal, query_offset}, scores, slopes, scale, key_padding_mask);
  const c10::cuda::CUDAGuard device(scores.device());
  Tensor output = contract::allocate_output(scores, problem.out);
  if (!cuda::is_empty(problem.shape)) {
    run_widest(kOp, scores.scalar_type(), problem, problem.in, problem.out);
  }
  return output;
}

std::tuple<Tensor, Tensor> alibi_softmax_backward_cuda(
    const Tensor& grad,
    const Tensor& probs,
    double scale,
    bool causal,
    std::optional<int64_t> query_offset,
    bool slopes_grad) {
  constexpr const char* kOp = "posenc::alibi_softmax_backward";
  auto problem = contract::alibi_softmax_backward_problem({kOp, causal, query_offset}, grad, probs, scale);
  const AlibiShape& shape = problem.shape;
  const c10::cuda::CUDAGuard device(probs.device());
  Tensor output = contract::allocate_output(probs, problem.out);
  const bool empty = cuda::is_empty(shape);
  Tensor slopes;
  Tensor row_sums;
  if (slopes_grad) {
    slopes = at::empty({shape.num_heads}, probs.options().dtype(contract::alibi_slopes_dtype(probs.scalar_type())));
    if (empty) {
      slopes.zero_();
    } else {
      row_sums = at::empty({shape.num_heads, shape.batch, shape.q_len}, probs.options().dtype(at::kDouble));
      problem.row_sums = row_sums.mutable_data_ptr<double>();
    }
  }
  if (!empty) {
    run_widest(kOp, probs.scalar_type(), problem, problem.grad, problem.probs, problem.out);
    if (slopes_grad) {
      cuda::for_dtype(probs.scalar_type(), [&](auto type) {
        using Real = cuda::arithmetic_t<typename decltype(type)::type>;
        cuda::sum_of_heads_kernel<Real>
            <<<dim3(shape.num_heads), cuda::kHeadSumThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
                problem.row_sums, shape.batch * shape.q_len, slopes.mutable_data_ptr<Real>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    }
  }
  return {output, slopes};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_softmax", alibi_softmax_cuda);
  m.impl("alibi_softmax_backward", alibi_softmax_backward_cuda);
}

}  // namespace posenc
