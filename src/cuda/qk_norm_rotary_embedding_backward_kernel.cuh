#pragma once

#include <cuda/detail/reduce.cuh>
#include <cuda/qk_norm_rotary_embedding_kernel.cuh>

// The gradients of RMSNorm over heads and rotation. qk_norm_rotary_embedding_kernel.cuh describes lanes and heads.
//
// The gradients of the weights are sums over all heads. In the backward pass a block therefore processes several heads
// in turn and keeps a sum for each channel in registers. The sums of a block are added in shared memory, those of all
// blocks by a second kernel. The order is fixed, without atomics, so the result has the same bits every time.
namespace posenc::cuda {

/// The incoming gradient of a chunk rotated by the negative angles: 2 V values in the arithmetic type.
template <typename T, typename Policy>
struct RotatedGradient {
  using Real = arithmetic_t<T>;
  static constexpr int V = Policy::kVectorWidth;

  Real values[2 * V];

  __device__ RotatedGradient(const HeadChunk<T, Policy>& grad, const ChunkTables<T, Policy>& tables, bool rotates) {
#pragma unroll
    for (int p = 0; p < V; ++p) {
      const int i = first_of_pair<Policy>(p);
      const int j = second_of_pair<Policy>(p);
      Real h1 = widen(grad[i]);
      Real h2 = widen(grad[j]);
      tables.rotate(p, h1, h2);
      values[i] = rotates ? h1 : widen(grad[i]);
      values[j] = rotates ? h2 : widen(grad[j]);
    }
  }

  /// The sum over the chunk of gradient times weight times input.
  __device__ Real sum_of_products(const HeadChunk<T, Policy>& x, const ChunkWeights<T, Policy>& weights) const {
    Real sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      sum = multiply_add(multiply(values[i], weights[i]), widen(x[i]), sum);
    }
    return sum;
  }

  /// Replaces `x` by its gradient. Calls `add_to_weight(i, value)` with the term of element i in the gradient of its
  /// weight.
  template <typename Add>
  __device__ void differentiate(
      HeadChunk<T, Policy>& x,
      const ChunkWeights<T, Policy>& weights,
      Real rstd,
      Real mean,
      const Add& add_to_weight) const {
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      const Real x_hat = multiply(widen(x[i]), rstd);
      add_to_weight(i, multiply(values[i], x_hat));
      x[i] = narrow<T>(multiply(rstd, multiply_add(values[i], weights[i], -multiply(x_hat, mean))));
    }
  }
};

/// @param partial_sums  `[blocks, D]`, or null if the gradients of the weights are not computed. Shared memory holds
///   `[blockDim.y, D]`.
template <typename T, typename Policy>
__global__ void __launch_bounds__(kMaxThreads, kMinNormBackwardBlocks<Policy>) qk_norm_rotary_embedding_backward_kernel(
    const __grid_constant__ QKNormRotaryBackwardProblem problem,
    const __grid_constant__ NormGrid grid,
    const __grid_constant__ NormScalars<arithmetic_t<T>> scalars,
    arithmetic_t<T>* __restrict__ partial_sums) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  extern __shared__ uint4 norm_bytes[];
  const RotaryProblem& rotary = problem.call.rotary;
  const auto head_dim = static_cast<int>(rotary.head_dim);
  const int lane = static_cast<int>(threadIdx.x);
  const NormRows rows(grid);
  const HeadOrder& order = grid.orders[rows.operand];
  const RotaryProblem::Operand& operand = rotary.operands[rows.operand];
  const QKNormRotaryBackwardProblem::Input& input = problem.inputs[rows.operand];
  const int64_t grad_stride = operand.in_strides.channel;
  const int64_t in_stride = input.strides.channel;
  const int64_t out_stride = operand.out_strides.channel;
  // The sums of this row of lanes. Only the lane of a channel accesses its entry before the end.
  Real* const sums = reinterpret_cast<Real*>(norm_bytes) + threadIdx.y * head_dim;

  if constexpr (Policy::kHeld) {
    const bool exists = Policy::kWhole || lane < grid.num_chunks;
    const ChunkChannels channels = channels_of_chunk<Policy>(rotary, lane);
    Real chunk_sums[2 * V] = {};
#pragma unroll 1
    for (int turn = 0; turn < grid.heads_in_turn; ++turn) {
      const uint32_t own = rows.first + turn * rows.step;
      const bool live = own < order.count;
      const HeadIndex index(order, live ? own : order.count - 1);
      HeadChunk<T, Policy> g;
      HeadChunk<T, Policy> x;
      if (exists) {
        g.template load<Policy::kSplat>(
            static_cast<const T*>(operand.in) + index.offset(operand.in_strides), grad_stride, channels);
        x.template load<false>(static_cast<const T*>(input.data) + index.offset(input.strides), in_stride, channels);
      }
      const ChunkTables<T, Policy> tables(rotary, index.batch, index.seq, channels, exists);
      const RotatedGradient<T, Policy> h(g, tables, channels.rotates);
      ChunkWeights<T, Policy> weights(problem.call, rows.operand, channels, exists);
      Real squares = x.sum_of_squares();
      Real products = h.sum_of_products(x, weights);
      sum_over_lanes(squares, products);
      const Real rstd = reciprocal_rms(scalars, tables.sign, squares);
      const Real mean = multiply(multiply(rstd, products), scalars.one_over_head_dim);
      x.keep_packed();
      weights.keep_packed();
      if (exists && live) {
        h.differentiate(x, weights, rstd, mean, [&](int i, Real value) { chunk_sums[i] += value; });
        x.store(static_cast<T*>(operand.out) + index.offset(operand.out_strides), out_stride, channels);
      }
    }
    if (partial_sums != nullptr && exists) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums[channels.first + i] = chunk_sums[i];
        if (channels.has_second) {
          sums[channels.second + i] = chunk_sums[V + i];
        }
      }
    }
  } else {
    const auto for_each_chunk = [&](const auto& body) {
      for (int chunk = lane; chunk < grid.num_chunks; chunk += static_cast<int>(blockDim.x)) {
        body(channels_of_chunk<Policy>(rotary, chunk));
      }
    };
    if (partial_sums != nullptr) {
      for_each_chunk([&](const ChunkChannels& channels) {
        sums[channels.first] = 0;
        if (channels.has_second) {
          sums[channels.second] = 0;
        }
      });
    }
#pragma unroll 1
    for (int turn = 0; turn < grid.heads_in_turn; ++turn) {
      const uint32_t own = rows.first + turn * rows.step;
      const bool live = own < order.count;
      const HeadIndex index(order, live ? own : order.count - 1);
      const T* grad = static_cast<const T*>(operand.in) + index.offset(operand.in_strides);
      const T* in = static_cast<const T*>(input.data) + index.offset(input.strides);
      T* out = static_cast<T*>(operand.out) + index.offset(operand.out_strides);
      // Calls `body` with the rotated gradient, the input and the weights of a chunk.
      const auto for_each_loaded_chunk = [&](const auto& body) {
        for_each_chunk([&](const ChunkChannels& channels) {
          HeadChunk<T, Policy> g;
          HeadChunk<T, Policy> x;
          g.template load<false>(grad, grad_stride, channels);
          x.template load<false>(in, in_stride, channels);
          const ChunkTables<T, Policy> tables(rotary, index.batch, index.seq, channels, /*exists=*/true);
          const ChunkWeights<T, Policy> weights(problem.call, rows.operand, channels, /*exists=*/true);
          body(RotatedGradient<T, Policy>(g, tables, channels.rotates), x, weights, channels);
        });
      };
      Real squares = 0;
      Real products = 0;
      for_each_loaded_chunk([&](const auto& h, const auto& x, const auto& weights, const ChunkChannels&) {
        squares += x.sum_of_squares();
        products += h.sum_of_products(x, weights);
      });
      const Real sign = sign_of_token<Real>(rotary, index.batch, index.seq);
      sum_over_lanes(squares, products);
      const Real rstd = reciprocal_rms(scalars, sign, squares);
      const Real mean = multiply(multiply(rstd, products), scalars.one_over_head_dim);
      if (!live) {
        continue;
      }
      for_each_loaded_chunk([&](const auto& h, auto& x, const auto& weights, const ChunkChannels& channels) {
        h.differentiate(x, weights, rstd, mean, [&](int i, Real value) {
          if (partial_sums != nullptr && (i == 0 || channels.has_second)) {
            sums[i == 0 ? channels.first : channels.second] += value;
          }
        });
        x.store(out, out_stride, channels);
      });
    }
  }

  if (partial_sums == nullptr) {
    return;
  }
  __syncthreads();
  const Real* const all = reinterpret_cast<const Real*>(norm_bytes);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x) + lane;
  for (int channel = thread; channel < head_dim; channel += static_cast<int>(blockDim.x * blockDim.y)) {
    Real sum = 0;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
      sum += all[y * head_dim + channel];
    }
    partial_sums[int64_t{rows.place} * head_dim + channel] = sum;
  }
}

/// Threads of a block of the second kernel. It reads `kSumChannels` channels, which fill a sector of 32 bytes in
/// float32, of many partial sums at once.
constexpr int kSumChannels = 8;
constexpr int kSumThreads = 1024;

/// The gradients of the weights from the sums of all blocks. Blocks along x are channels, along y operands.
template <typename T, typename Real>
__global__ void __launch_bounds__(kSumThreads) qk_norm_weight_gradients_kernel(
    const Real* __restrict__ partial_sums,
    uint32_t blocks_of_first,
    uint32_t num_blocks,
    int32_t head_dim,
    T* __restrict__ first_result,
    T* __restrict__ second_result) {
  constexpr int kInFlight = 8;
  constexpr int kRows = kSumThreads / kSumChannels;
  constexpr int kWarps = kSumThreads / kWarp;
  __shared__ double scratch[kSumChannels][kWarps];
  const auto thread = static_cast<int>(threadIdx.x);
  const int channel = static_cast<int>(blockIdx.x) * kSumChannels + thread % kSumChannels;
  const uint32_t begin = blockIdx.y == 0 ? 0 : blocks_of_first;
  const uint32_t end = blockIdx.y == 0 ? blocks_of_first : num_blocks;
  double sum = 0;
  for (uint32_t block = begin + thread / kSumChannels; block < end; block += kInFlight * kRows) {
    Real values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const uint32_t row = block + u * kRows;
      values[u] = row < end && channel < head_dim ? partial_sums[int64_t{row} * head_dim + channel] : Real(0);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      sum += static_cast<double>(values[u]);
    }
  }
  // Sums over the threads of a warp that have the same channel, then over the warps.
#pragma unroll
  for (int offset = kWarp / 2; offset >= kSumChannels; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, offset);
  }
  if (thread % kWarp < kSumChannels) {
    scratch[thread % kWarp][thread / kWarp] = sum;
  }
  __syncthreads();
  const int warp = thread / kWarp;
  const int result_channel = static_cast<int>(blockIdx.x) * kSumChannels + warp;
  if (warp >= kSumChannels) {
    return;
  }
  sum = reduce_warp(scratch[warp][thread % kWarp], Sum());
  if (thread % kWarp == 0 && result_channel < head_dim) {
    (blockIdx.y == 0 ? first_result : second_result)[result_channel] = narrow<T>(static_cast<arithmetic_t<T>>(sum));
  }
}

}  // namespace posenc::cuda
