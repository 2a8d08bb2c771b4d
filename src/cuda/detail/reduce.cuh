#pragma once

#include <cuda/detail/score_grid.h>

// Sums and maxima over threads, in a fixed order. No torch.
namespace posenc::cuda {

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

/// Ignores NaN, which the sum of the exponentials propagates.
struct Maximum {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

template <typename T, typename Op>
__device__ T reduce_warp(T value, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(0xffffffffU, value, offset));
  }
  return value;
}

/// Reduces over the threads of a block that have the same y, and returns the result to all of them. `blockDim.x` is a
/// multiple of a warp, and all threads of the block take part. `scratch` has one entry for each warp and no other use.
template <typename T, typename Op>
__device__ T reduce_row(T value, T identity, Op op, T* scratch) {
  value = reduce_warp(value, op);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) {
    return value;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  T* row = scratch + threadIdx.y * warps;
  if (lane == 0) {
    row[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  return reduce_warp(lane < warps ? row[lane] : identity, op);
}

/// Sums each of N values over the threads of a block that have the same y, and returns the results to all of them, with
/// one barrier. Conditions as in `reduce_row`; `scratch` has N entries for each warp.
template <int N, typename T>
__device__ void sum_row(T (&values)[N], T* scratch) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = reduce_warp(values[n], Sum());
  }
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) {
    return;
  }
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  T* row = scratch + threadIdx.y * warps * N;
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      row[threadIdx.x / kWarp * N + n] = values[n];
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = reduce_warp(lane < warps ? row[lane * N + n] : T(0), Sum());
  }
}

/// The sum over all threads of a block, returned to its first thread. The block consists of whole warps. `scratch` has
/// one entry for each of at most 32 warps.
template <typename T>
__device__ T sum_of_block(T value, T* scratch) {
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int warps = static_cast<int>(blockDim.x * blockDim.y) / kWarp;
  value = reduce_warp(value, Sum());
  if (thread % kWarp == 0) {
    scratch[thread / kWarp] = value;
  }
  __syncthreads();
  if (thread < kWarp) {
    value = reduce_warp(thread < warps ? scratch[thread] : T(0), Sum());
  }
  return value;
}

constexpr int kHeadSumThreads = 512;

/// The gradient of slopes from `count` sums of `grad * distance` for each head, with one block for each head.
template <typename Real>
__global__ void __launch_bounds__(kHeadSumThreads)
    sum_of_heads_kernel(const double* __restrict__ sums, int64_t count, Real* __restrict__ result) {
  constexpr int kInFlight = 4;
  __shared__ double scratch[kWarp];
  const double* head = sums + blockIdx.x * count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kInFlight * kHeadSumThreads) {
    double values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t index = i + u * kHeadSumThreads;
      values[u] = index < count ? head[index] : 0;
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      sum += values[u];
    }
  }
  sum = sum_of_block(sum, scratch);
  if (threadIdx.x == 0) {
    result[blockIdx.x] = static_cast<Real>(-sum);
  }
}

}  // namespace posenc::cuda
