#include <arguments/rotary_frequencies.h>
#include <cuda/detail/dispatch.h>
#include <cuda/kernels.h>
#include <cuda/detail/reduce.cuh>
#include <cuda/rotary_tables_backward_kernel.cuh>
#include <cuda/rotary_tables_kernel.cuh>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <tuple>

namespace posenc::cuda {
namespace {

using at::Tensor;

/// Rows of a block at least, and blocks that share a pair at most: work for every SM, and not so many sums that the
/// second kernel takes long.
constexpr int64_t kRowsPerBlock = 32;
constexpr int64_t kMaxRowGroups = 2048;

}  // namespace

std::tuple<Tensor, Tensor> rotary_tables(
    const Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor) {
  const c10::cuda::CUDAGuard device(inv_freq.device());
  const auto call = arguments::frequencies_call(inv_freq, length, dtype, attention_factor);
  const FrequenciesProblem& problem = call.problem;
  if (problem.length == 0 || problem.num_pairs == 0) {
    return {call.cos, call.sin};
  }
  const int64_t pairs = std::min<int64_t>(problem.num_pairs, kMaxThreads);
  const int64_t rows = kMaxThreads / pairs;
  const int64_t row_groups = ceil_div(problem.length, rows);
  const int64_t pair_groups = ceil_div(problem.num_pairs, pairs);
  TORCH_CHECK(
      row_groups <= kMaxGridX && pair_groups <= kMaxGridY, "posenc::rotary_tables: expected at most ", kMaxGridX * rows,
      " rows and ", kMaxGridY * pairs, " pairs on CUDA, got ", problem.length, " and ", problem.num_pairs);
  const dim3 grid(row_groups, pair_groups);
  const dim3 block(pairs, rows);
  for_bool(inv_freq.scalar_type() == at::kDouble, [&](auto wide_frequencies) {
    for_bool(dtype == at::kDouble, [&](auto wide_tables) {
      using Freq = std::conditional_t<decltype(wide_frequencies)::value, double, float>;
      using Real = std::conditional_t<decltype(wide_tables)::value, double, float>;
      rotary_tables_kernel<Freq, Real><<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(problem);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {call.cos, call.sin};
}

Tensor rotary_tables_backward(
    const Tensor& grad_cos,
    const Tensor& grad_sin,
    const Tensor& cos,
    const Tensor& sin,
    at::ScalarType dtype) {
  const auto problem = arguments::frequencies_backward_problem({grad_cos, grad_sin, cos, sin, dtype});
  const c10::cuda::CUDAGuard device(cos.device());
  Tensor result = at::empty({problem.num_pairs}, cos.options().dtype(dtype));
  if (problem.length == 0 || problem.num_pairs == 0) {
    return result.zero_();
  }
  const int64_t pairs = std::min<int64_t>(problem.num_pairs, kMaxThreads);
  const int64_t rows_per_block = std::max(kRowsPerBlock, ceil_div(problem.length, kMaxRowGroups));
  const int64_t row_groups = ceil_div(problem.length, rows_per_block);
  const int64_t pair_groups = ceil_div(problem.num_pairs, pairs);
  TORCH_CHECK(
      pair_groups <= kMaxGridY, "posenc::rotary_tables_backward: expected at most ", kMaxGridY * pairs,
      " pairs on CUDA, got ", problem.num_pairs);
  const Tensor sums = at::empty({problem.num_pairs, row_groups}, cos.options().dtype(at::kDouble));
  auto* const sums_data = sums.mutable_data_ptr<double>();
  const dim3 grid(row_groups, pair_groups);
  const dim3 block(pairs, kMaxThreads / pairs);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for_bool(cos.scalar_type() == at::kDouble, [&](auto wide) {
    using Real = std::conditional_t<decltype(wide)::value, double, float>;
    rotary_tables_backward_kernel<Real><<<grid, block, 0, stream>>>(problem, rows_per_block, sums_data);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  for_bool(dtype == at::kDouble, [&](auto wide) {
    using Real = std::conditional_t<decltype(wide)::value, double, float>;
    sum_of_heads_kernel<Real><<<dim3(problem.num_pairs), kHeadSumThreads, 0, stream>>>(
        sums_data, row_groups, result.mutable_data_ptr<Real>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

}  // namespace posenc::cuda
