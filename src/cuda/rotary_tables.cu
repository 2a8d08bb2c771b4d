#include <contract/rotary_frequencies.h>
#include <cuda/detail/dispatch.h>
#include <cuda/kernels.h>
#include <cuda/rotary_tables_kernel.cuh>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <tuple>

namespace posenc {

using at::Tensor;

std::tuple<Tensor, Tensor> cuda::rotary_tables(
    const Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor) {
  const c10::cuda::CUDAGuard device(inv_freq.device());
  const auto call = contract::frequencies_call(inv_freq, length, dtype, attention_factor);
  const FrequenciesProblem& problem = call.problem;
  if (problem.length == 0 || problem.num_pairs == 0) {
    return {call.cos, call.sin};
  }
  const int64_t pairs = std::min<int64_t>(problem.num_pairs, cuda::kMaxThreads);
  const int64_t rows = cuda::kMaxThreads / pairs;
  const int64_t row_groups = cuda::ceil_div(problem.length, rows);
  const int64_t pair_groups = cuda::ceil_div(problem.num_pairs, pairs);
  TORCH_CHECK(
      row_groups <= cuda::kMaxGridX && pair_groups <= cuda::kMaxGridY, "posenc::rotary_tables: expected at most ",
      cuda::kMaxGridX * rows, " rows and ", cuda::kMaxGridY * pairs, " pairs on CUDA, got ", problem.length, " and ",
      problem.num_pairs);
  const dim3 grid(row_groups, pair_groups);
  const dim3 block(pairs, rows);
  cuda::for_bool(inv_freq.scalar_type() == at::kDouble, [&](auto wide_frequencies) {
    cuda::for_bool(dtype == at::kDouble, [&](auto wide_tables) {
      using Freq = std::conditional_t<decltype(wide_frequencies)::value, double, float>;
      using Real = std::conditional_t<decltype(wide_tables)::value, double, float>;
      cuda::rotary_tables_kernel<Freq, Real><<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(problem);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {call.cos, call.sin};
}

}  // namespace posenc
