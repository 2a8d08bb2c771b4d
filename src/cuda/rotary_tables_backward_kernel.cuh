#pragma once

#include <arguments/rotary_frequencies_problem.h>
#include <cuda/detail/launch.h>

// The gradient of the frequencies, in two stages: a block sums some rows of some pairs, and a second kernel sums the
// blocks of a pair (reduce.cuh). Threads along x are pairs, along y rows. Sums are float64 in a fixed order, without
// atomics, so the result has the same bits every time.
namespace posenc::cuda {

template <typename Real>
__device__ double table_entry(const TableView& table, int64_t row, int64_t pair) {
  return static_cast<double>(static_cast<const Real*>(table.data)[row * table.stride_row + pair * table.stride_pair]);
}

/// @param sums  `[num_pairs, row groups]`, the negative gradient: the second kernel changes the sign.
template <typename Real>
__global__ void __launch_bounds__(kMaxThreads) rotary_tables_backward_kernel(
    const __grid_constant__ FrequenciesBackwardProblem problem,
    int64_t rows_per_block,
    double* __restrict__ sums) {
  __shared__ double partial[kMaxThreads];
  const int64_t pair = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  const int64_t begin = int64_t{blockIdx.x} * rows_per_block;
  const int64_t end = begin + rows_per_block < problem.length ? begin + rows_per_block : problem.length;
  double sum = 0;
  if (pair < problem.num_pairs) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) {
      const double against = table_entry<Real>(problem.sin, row, pair) * table_entry<Real>(problem.grad_cos, row, pair);
      const double along = table_entry<Real>(problem.cos, row, pair) * table_entry<Real>(problem.grad_sin, row, pair);
      sum += static_cast<double>(row) * (against - along);
    }
  }
  partial[threadIdx.y * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && pair < problem.num_pairs) {
    for (uint32_t y = 1; y < blockDim.y; ++y) {
      sum += partial[y * blockDim.x + threadIdx.x];
    }
    sums[pair * gridDim.x + blockIdx.x] = sum;
  }
}

}  // namespace posenc::cuda
