#pragma once

#include <arguments/attention_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/reduce.cuh>

#include <cstdint>

// The last step of the gradient of the slopes of attention. No torch.
namespace posenc::cuda {

/// Warps of a block that have different rows, and rows that a block holds.
constexpr int kAttentionRowWarps = 4;
constexpr int kAttentionHeldRows = kAttentionRowWarps * 16;

constexpr int kGradSlopesThreads = 128;

/// The gradient of the slopes from the sums of `tiles` tiles, with a block for each head and, if slopes differ between
/// sequences, for each sequence.
__global__ void __launch_bounds__(kGradSlopesThreads)
    attention_grad_slopes_kernel(const __grid_constant__ AttentionBackwardProblem problem, int64_t tiles) {
  __shared__ double scratch[kWarp];
  const int64_t head = blockIdx.x;
  const int64_t batch = blockIdx.y;
  int64_t begin = 0;
  int64_t end = tiles;
  if (problem.slopes_stride != 0) {
    const int64_t* const cu_seqlens = problem.cu_seqlens_q;
    const auto first_tile = [&](int64_t b) {
      const int64_t number = cu_seqlens == nullptr ? tiles / problem.batch * b : cu_seqlens[b] / kAttentionHeldRows + b;
      return max(int64_t{0}, min(number, tiles));
    };
    begin = first_tile(batch);
    end = first_tile(batch + 1);
  }
  double total = 0;
  for (int64_t tile = begin + threadIdx.x; tile < end; tile += kGradSlopesThreads) {
    total -= problem.slope_sums[head * tiles + tile];
  }
  total = sum_of_block(total, scratch);
  if (threadIdx.x == 0) {
    problem.grad_slopes[batch * problem.q_heads + head] = static_cast<float>(total);
  }
}

}  // namespace posenc::cuda
