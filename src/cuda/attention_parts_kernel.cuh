#pragma once

#include <arguments/attention_problem.h>
#include <cuda/detail/vector_width.h>
#include <cuda/detail/vector.cuh>

namespace posenc::cuda {

/// Merges two parts of the keys: a thread for V channels of a row, threads of a block along channels (x) and rows (y).
/// Heads and sequences are blockIdx.y and blockIdx.z.
/// @tparam First,T  element types of the outputs of the first part, and of the second.
template <typename First, typename T, int V>
__global__ void attention_parts_kernel(const __grid_constant__ AttentionPartsProblem problem) {
  using Real = arithmetic_t<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= problem.rows) {
    return;
  }
  const int64_t head = blockIdx.y;
  const int64_t sequence = blockIdx.z;
  const auto out_row = [&](const HeadStrides& strides) {
    return sequence * strides.batch + row * strides.token + head * strides.head;
  };
  const auto lse_of = [&](const AttentionPartRows& part) {
    const RowStrides& strides = part.lse_strides;
    return static_cast<const Real*>(part.lse)[sequence * strides.batch + head * strides.head + row * strides.token];
  };
  const Real first_lse = lse_of(problem.first);
  const Real second_lse = lse_of(problem.second);
  // NaN of either part is kept. Without visible keys both are -inf, and the row is zero.
  const Real largest = first_lse > second_lse ? first_lse : second_lse;
  const Real shift = largest == -INFINITY ? Real{0} : largest;
  const Real first_weight = ::exp(first_lse - shift);
  const Real second_weight = ::exp(second_lse - shift);
  const Real sum = first_weight + second_weight;
  const Real scale = sum == 0 ? Real{0} : 1 / sum;
  const First* const first = static_cast<const First*>(problem.first.out) + out_row(problem.first.out_strides);
  const T* const second = static_cast<const T*>(problem.second.out) + out_row(problem.second.out_strides);
  const int64_t of_row = (sequence * problem.rows + row) * problem.heads + head;
  Real* const out = static_cast<Real*>(problem.out) + of_row * problem.head_dim;
  for (int channel = static_cast<int>(threadIdx.x) * V; channel < problem.head_dim; channel += blockDim.x * V) {
    const Vector<Real, V> a = widen(load<V>(first + channel));
    const Vector<Real, V> b = widen(load<V>(second + channel));
    Vector<Real, V> merged;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      merged[i] = first_weight * scale * a[i] + second_weight * scale * b[i];
    }
    store<V>(out + channel, merged);
  }
  if (threadIdx.x == 0) {
    static_cast<Real*>(problem.lse)[(sequence * problem.heads + head) * problem.rows + row] =
        sum == 0 ? -INFINITY : shift + ::log(sum);
  }
}

}  // namespace posenc::cuda
