#pragma once

#include <arguments/attention_problem.h>
#include <cuda/detail/vector_width.h>
#include <cuda/detail/vector.cuh>

// Results of attention over parts of the keys as those over all keys: merges outputs, and adds gradients. A thread
// computes V channels of a row. Threads of a block are along channels (x) and rows (y); heads and sequences are
// blockIdx.y and blockIdx.z.
namespace posenc::cuda {

/// The row of a thread, of head blockIdx.y and sequence blockIdx.z.
__device__ inline int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

__device__ inline int64_t index_of(const HeadStrides& strides, int64_t row) {
  return blockIdx.z * strides.batch + row * strides.token + blockIdx.y * strides.head;
}
__device__ inline int64_t index_of(const RowStrides& strides, int64_t row) {
  return blockIdx.z * strides.batch + row * strides.token + blockIdx.y * strides.head;
}

/// @tparam First,T,Out  element types of the outputs of the first part, of the second, and of both together.
template <typename First, typename T, typename Out, int V>
__global__ void merge_parts_kernel(const __grid_constant__ MergePartsProblem problem) {
  using Real = arithmetic_t<T>;
  const int64_t row = row_of_thread();
  if (row >= problem.rows) {
    return;
  }
  const Real first_lse = static_cast<const Real*>(problem.first.lse)[index_of(problem.first.lse_strides, row)];
  const Real second_lse = static_cast<const Real*>(problem.second.lse)[index_of(problem.second.lse_strides, row)];
  // NaN of either part is kept. Without visible keys both are -inf, and the row is zero.
  const Real largest = first_lse > second_lse ? first_lse : second_lse;
  const Real shift = largest == -INFINITY ? Real{0} : largest;
  const Real first_weight = ::exp(first_lse - shift);
  const Real second_weight = ::exp(second_lse - shift);
  const Real sum = first_weight + second_weight;
  const Real scale = sum == 0 ? Real{0} : 1 / sum;
  const First* const first = static_cast<const First*>(problem.first.out) + index_of(problem.first.out_strides, row);
  const T* const second = static_cast<const T*>(problem.second.out) + index_of(problem.second.out_strides, row);
  Out* const out = static_cast<Out*>(problem.out) + index_of(problem.out_strides, row);
  for (int channel = static_cast<int>(threadIdx.x) * V; channel < problem.head_dim; channel += blockDim.x * V) {
    const Vector<Real, V> a = widen(load<V>(first + channel));
    const Vector<Real, V> b = widen(load<V>(second + channel));
    Vector<Real, V> merged;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      merged[i] = first_weight * scale * a[i] + second_weight * scale * b[i];
    }
    store<V>(out + channel, narrow<Out, V>(merged));
  }
  if (threadIdx.x == 0) {
    static_cast<Real*>(problem.lse)[index_of(problem.lse_strides, row)] = sum == 0 ? -INFINITY : shift + ::log(sum);
  }
}

/// @tparam T,Out  element types of the terms that are not wide, and of the sum.
template <typename T, typename Out, int V>
__global__ void sum_parts_kernel(const __grid_constant__ SumPartsProblem problem) {
  using Real = arithmetic_t<T>;
  const int64_t row = row_of_thread();
  if (row >= problem.rows) {
    return;
  }
  Out* const out = static_cast<Out*>(problem.out) + index_of(problem.out_strides, row);
  for (int channel = static_cast<int>(threadIdx.x) * V; channel < problem.head_dim; channel += blockDim.x * V) {
    Vector<Real, V> sum = splat<V>(Real{0});
    for (int i = 0; i < problem.count; ++i) {
      const SumTerm& term = problem.terms[i];
      const int64_t index = index_of(term.strides, row) + channel;
      const Vector<Real, V> x = term.wide ? load<V>(static_cast<const Real*>(term.data) + index)
                                          : widen(load<V>(static_cast<const T*>(term.data) + index));
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sum[j] += x[j];
      }
    }
    store<V>(out + channel, narrow<Out, V>(sum));
  }
}

}  // namespace posenc::cuda
