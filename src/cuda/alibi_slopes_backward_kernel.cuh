#pragma once

#include <cuda/detail/launch.h>
#include <cuda/detail/score_grid.h>
#include <cuda/detail/reduce.cuh>
#include <cuda/detail/score_vectors.cuh>

// The sum of gradient times distance for each head, in two stages: a block sums some rows of one head, and a second
// kernel sums the blocks of a head (reduce.cuh). Vectors are summed in the arithmetic type, everything else in float64.
// The order is fixed, without atomics, so the result has the same bits every time.
namespace posenc::cuda {

/// 16-byte loads that a thread has in flight.
constexpr int kSumVectors = 4;

/// Blocks that an SM holds at least. With the 40 registers of `kMinBlocks` the vectors in flight would spill.
constexpr int kMinSumBlocks = 10;

/// `sums` is `[H, B, row groups]`.
template <typename T, int V, bool Causal>
__global__ void __launch_bounds__(kMaxThreads, kMinSumBlocks) alibi_slopes_backward_kernel(
    const __grid_constant__ AlibiShape shape,
    const __grid_constant__ ScoresIn grad,
    const __grid_constant__ Matrices matrices,
    int32_t rows_per_block,
    double* __restrict__ sums) {
  using Real = arithmetic_t<T>;
  __shared__ double scratch[kWarp];
  const uint32_t matrix = Matrices::of_block();
  if (matrix >= matrices.count) {
    return;
  }
  const auto [batch, head] = matrices.index(matrix);
  const uint32_t step = blockDim.x * V;
  const int64_t first_row = int64_t{blockIdx.x} * rows_per_block;
  const T* matrix_grad = static_cast<const T*>(grad.data) + grad.strides.row(batch, head, 0);
  double sum = 0;
  for (int64_t row = threadIdx.y; row < rows_per_block && first_row + row < shape.q_len; row += blockDim.y) {
    const auto query = static_cast<int32_t>(first_row + row);
    const int32_t position = shape.position(query);
    const auto visible = static_cast<uint32_t>(Causal ? shape.visible(position) : shape.k_len);
    const T* data = matrix_grad + query * grad.strides.query;
    for (uint32_t first = threadIdx.x * V; first < visible; first += kSumVectors * step) {
      Vector<T, V> values[kSumVectors];
#pragma unroll
      for (int u = 0; u < kSumVectors; ++u) {
        values[u] = Vector<T, V>{};
        if (first + u * step < visible) {
          values[u] = load_strided<V>(data, first + u * step, grad.strides.key);
        }
      }
#pragma unroll
      for (int u = 0; u < kSumVectors; ++u) {
        const uint32_t key = first + u * step;
        Real part = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const Real factor = Causal && key + i >= visible ? Real(0) : widen(values[u][i]);
          part = multiply_add(factor, distance<Real>(position, key + i), part);
        }
        sum += static_cast<double>(part);
      }
    }
  }
  sum = sum_of_block(sum, scratch);
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    sums[(head * shape.batch + batch) * gridDim.x + blockIdx.x] = sum;
  }
}

/// The same if all keys of a row share one gradient, as after sum(): one thread for each row, which is summed in closed
/// form.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) alibi_slopes_backward_of_expanded_kernel(
    const __grid_constant__ AlibiShape shape,
    const __grid_constant__ ScoresIn grad,
    const __grid_constant__ Matrices matrices,
    double* __restrict__ sums) {
  __shared__ double scratch[kWarp];
  const uint32_t matrix = Matrices::of_block();
  if (matrix >= matrices.count) {
    return;
  }
  const auto [batch, head] = matrices.index(matrix);
  const int64_t query = int64_t{blockIdx.x} * kMaxThreads + threadIdx.x;
  double sum = 0;
  if (query < shape.q_len) {
    const int32_t position = shape.position(static_cast<int32_t>(query));
    const int32_t visible = shape.visible(position);
    if (visible > 0) {
      const T value = static_cast<const T*>(grad.data)[grad.strides.row(batch, head, query)];
      sum = static_cast<double>(widen(value)) * AlibiShape::sum_of_distances(position, visible);
    }
  }
  sum = sum_of_block(sum, scratch);
  if (threadIdx.x == 0) {
    sums[(head * shape.batch + batch) * gridDim.x + blockIdx.x] = sum;
  }
}

}  // namespace posenc::cuda
