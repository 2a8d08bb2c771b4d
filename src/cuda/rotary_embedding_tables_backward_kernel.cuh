#pragma once

#include <contract/rotary_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/vector.cuh>

// Gradients of cos and sin. A block owns one row of the tables: threads along x are its pairs, threads along y
// share the heads of all tokens that read the row. Their sums meet in shared memory in a fixed order, so that the
// result is the same to the last bit every time, without atomics.
namespace posenc::cuda {

/// Threads along x: enough for neighbouring threads to read whole sectors, few enough to leave threads for the sum.
constexpr int kPairsPerBlock = 32;
constexpr int kSummandsPerBlock = kMaxThreads / kPairsPerBlock;

template <typename T, bool Interleaved>
__global__ void __launch_bounds__(kMaxThreads)
    rotary_embedding_tables_backward_kernel(const __grid_constant__ RotaryTablesProblem problem) {
  using Real = arithmetic_t<T>;
  __shared__ Real partial_cos[kSummandsPerBlock][kPairsPerBlock];
  __shared__ Real partial_sin[kSummandsPerBlock][kPairsPerBlock];

  const int64_t row = blockIdx.x;
  const int64_t pair = int64_t{blockIdx.y} * kPairsPerBlock + threadIdx.x;
  const int64_t first = Interleaved ? 2 * pair : pair;
  const int64_t second = Interleaved ? 2 * pair + 1 : pair + problem.num_pairs;
  RotaryTablesProblem::Readers readers{};
  if (pair < problem.num_pairs) {
    readers = problem.readers(row, problem.num_axes > 1 ? problem.pair_axes.axis(pair) : 0);
  }

  Real sum_cos = 0;
  Real sum_sin = 0;
  for (int64_t i = 0; i < readers.count; ++i) {
    const int64_t token = readers.token(i);
    const int64_t batch = token / problem.seq_len;
    const int64_t seq = token - batch * problem.seq_len;
    for (int o = 0; o < problem.num_operands; ++o) {
      const RotaryTablesProblem::Operand& operand = problem.operands[o];
      const Strides& gs = operand.grad_strides;
      const Strides& xs = operand.input_strides;
      const T* g = static_cast<const T*>(operand.grad) + batch * gs.batch + seq * gs.seq;
      const T* x = static_cast<const T*>(operand.input) + batch * xs.batch + seq * xs.seq;
      for (int64_t head = threadIdx.y; head < operand.num_heads; head += kSummandsPerBlock) {
        const Real g1 = widen(g[head * gs.head + first * gs.channel]);
        const Real g2 = widen(g[head * gs.head + second * gs.channel]);
        const Real x1 = widen(x[head * xs.head + first * xs.channel]);
        const Real x2 = widen(x[head * xs.head + second * xs.channel]);
        sum_cos += g1 * x1 + g2 * x2;
        sum_sin += g2 * x1 - g1 * x2;
      }
    }
  }
  partial_cos[threadIdx.y][threadIdx.x] = sum_cos;
  partial_sin[threadIdx.y][threadIdx.x] = sum_sin;
  __syncthreads();
  if (threadIdx.y != 0 || pair >= problem.num_pairs) {
    return;
  }
  for (int y = 1; y < kSummandsPerBlock; ++y) {
    sum_cos += partial_cos[y][threadIdx.x];
    sum_sin += partial_sin[y][threadIdx.x];
  }
  static_cast<Real*>(problem.grad_cos)[row * problem.num_pairs + pair] = sum_cos;
  static_cast<Real*>(problem.grad_sin)[row * problem.num_pairs + pair] = problem.conjugate ? -sum_sin : sum_sin;
}

}  // namespace posenc::cuda
