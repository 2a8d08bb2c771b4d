#pragma once

#include <cuda/detail/attention_tile.cuh>

// What the backward pass of attention needs of each row, computed once before its other kernels. No torch.
namespace posenc::cuda {

/// Lanes that share a row in `attention_row_terms_kernel`.
constexpr int kRowTermsLanes = 8;
constexpr int kRowTermsThreads = 128;
constexpr int kRowTermsRows = kRowTermsThreads / kRowTermsLanes;

/// Writes the terms of each row: `shift`, the binary logarithm of the divisor of its exponentials for distances
/// relative to the nearest key, infinite for rows without keys; and `delta = rowsum(dout out) - dlse`.
template <typename T>
__global__ void __launch_bounds__(kRowTermsThreads)
    attention_row_terms_kernel(const __grid_constant__ AttentionBackwardProblem problem) {
  const int head = static_cast<int>(blockIdx.y);
  const TileOfSequence tile = find_tile(
      problem, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.z), kRowTermsRows, /*of_queries=*/true);
  const Sequence& sequence = tile.sequence;
  const int lane = static_cast<int>(threadIdx.x) % kRowTermsLanes;
  const int row = tile.first + static_cast<int>(threadIdx.x) / kRowTermsLanes;
  const bool exists = tile.any && row < sequence.q_rows;
  const bool alive = exists && sequence.valid && row < sequence.q_len;
  const int64_t token = sequence.q_first + row;
  float delta = 0;
  if (alive) {
    const auto grad_out = rows_of_head<T>(problem.grad_out, problem.grad_out_strides, sequence, token, head);
    const auto out = rows_of_head<T>(problem.out, problem.out_strides, sequence, token, head);
    for (int channel = lane * mma::kChunk; channel < problem.head_dim; channel += kRowTermsLanes * mma::kChunk) {
      const auto a = widen(load<mma::kChunk>(grad_out.first + channel));
      const auto b = widen(load<mma::kChunk>(out.first + channel));
#pragma unroll
      for (int i = 0; i < mma::kChunk; ++i) {
        delta = fmaf(a[i], b[i], delta);
      }
    }
  }
#pragma unroll
  for (int offset = 1; offset < kRowTermsLanes; offset *= 2) {
    delta += __shfl_xor_sync(0xffffffffU, delta, offset);
  }
  if (lane != 0 || !exists) {
    return;
  }
  float lse = -INFINITY;
  if (alive) {
    lse = problem.lse[row_index(problem.lse_strides, sequence, head, token)];
    if (problem.grad_lse != nullptr) {
      delta -= problem.grad_lse[row_index(problem.grad_lse_strides, sequence, head, token)];
    }
  }
  const Positions positions(problem, sequence);
  const float slope = slope_of<float>(problem, sequence, head);
  const float away = static_cast<float>(positions.away(positions.of(row)));
  // 2^(x - infinity) is 0: rows without a visible key contribute nothing.
  const float shift = lse == -INFINITY ? INFINITY : fmaf(slope, away, lse) * kLog2E;
  auto* const terms = reinterpret_cast<float2*>(problem.row_terms);
  terms[row_index(problem.row_terms_strides, sequence, head, token)] = {shift, delta};
}

}  // namespace posenc::cuda
