#pragma once

#include <arguments/qk_norm_rotary_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/reduce.cuh>
#include <cuda/detail/rotary_chunk.cuh>

#include <type_traits>

// RMSNorm over heads and rotation in one launch, and its gradients.
//
// Lanes along x, a power of two of them and at most a warp, share a head; heads are along y. A lane *holds* one chunk
// (rotary_chunk.cuh) in registers from its only load to its only store, and the sums of a head meet by shuffles. Heads
// of more chunks than a warp has lanes, or of strides that allow no vectors, are gone through twice instead, element by
// element.
//
// The gradients of the weights are sums over all heads. In the backward pass a block therefore takes several heads in
// turn and keeps a sum for each channel in registers; its sums are added in shared memory, and those of all blocks by a
// second kernel, all of it in one order: the same bits every time, without atomics.
namespace posenc::cuda {

/// Blocks that an SM holds at least: a chunk, its row of the tables and its weights take 64 registers, and 80 with the
/// incoming gradient and the sums for the weights. One block more, and they spill; but where heads are whole and a
/// vector of weights is as narrow as one of elements, 56 do: 1.03 instead of 1.09 times the copy, measured on an H100
/// with bfloat16, 8192 tokens, 32 and 8 heads of 128. Rows of several axes take more.
template <typename Policy>
constexpr int kMinNormBlocks = Policy::kHeld && Policy::kAxes ? 6
    : Policy::kWhole && Policy::kNarrowWeights                ? 9
                                                              : 8;
template <typename Policy>
constexpr int kMinNormBackwardBlocks = Policy::kHeld && Policy::kAxes ? 4 : 6;

/// Sums of channels that a block has shared memory for, in float64 and without asking for more than 48 KiB, and the
/// channels of the largest head that leave it some to spare.
constexpr int64_t kMaxNormSums = 6144;
constexpr int64_t kMaxNormHeadDim = 4096;

/// What a launch knows beforehand. Vectors of one element are gone through, wider ones held. With `IsSplat` a gradient
/// is one value for all channels of a head, as that of a sum is. `WeightType` counts for held chunks only: whatever
/// waits for the choice between two types would wait for the loads too. `IsWhole`: each lane has a chunk, and all of
/// them rotate.
template <int VectorWidth, bool IsInterleaved, bool IsSplat, bool HasAxes, typename WeightType, bool IsWhole = false>
struct NormPolicy {
  static constexpr int kVectorWidth = VectorWidth;
  static constexpr bool kInterleaved = IsInterleaved;
  static constexpr bool kSplat = IsSplat;
  static constexpr bool kAxes = HasAxes;  // positions may have several
  static constexpr bool kHeld = VectorWidth > 1;
  static constexpr bool kWhole = IsWhole;
  static constexpr bool kTail = !IsWhole;
  static constexpr bool kNarrowWeights = VectorWidth * static_cast<int>(sizeof(WeightType)) <= kMaxVectorBytes;
  using Weight = WeightType;
};

/// In which order the heads of an operand are numbered: that of its memory.
struct HeadOrder {
  Divider inner;   // heads of a token or, where tokens come first, tokens of a head
  Divider middle;  // the other of the two
  uint32_t count;  // of all batches
  bool tokens_first;
};

/// How blocks are laid over the heads: `blocks_of_first` over those of operand 0, all others over those of operand 1.
struct NormGrid {
  HeadOrder orders[2];
  uint32_t blocks_of_first;
  int32_t num_chunks;     // of one head
  int32_t heads_in_turn;  // that a row of lanes takes one after the other
  /// Where not 0, blocks of operand 1 come between those of operand 0, this many of 2^32: heads of a token are then
  /// worked on at about the same time, and its row of the tables is read from memory once (1.09 instead of 1.15 times
  /// the copy, measured on an H100).
  uint32_t mix;
};

/// What every head needs, in the arithmetic type: a thread has better to do than to convert and to divide.
template <typename Real>
struct NormScalars {
  Real eps, one_over_head_dim;
};

/// One head of one token.
struct HeadIndex {
  uint32_t batch, seq, head;

  __device__ HeadIndex(const HeadOrder& order, uint32_t index) {
    const uint32_t outer = order.inner.quotient(index);
    const uint32_t fast = index - outer * order.inner.divisor;
    batch = order.middle.quotient(outer);
    const uint32_t slow = outer - batch * order.middle.divisor;
    seq = order.tokens_first ? fast : slow;
    head = order.tokens_first ? slow : fast;
  }

  __device__ int64_t offset(const Strides& strides) const {
    return batch * strides.batch + seq * strides.seq + head * strides.head;
  }
};

/// The weights of the elements of a chunk, narrow until they are used.
template <typename T, typename Policy>
struct ChunkWeights {
  using Real = arithmetic_t<T>;
  using W = std::conditional_t<Policy::kHeld, typename Policy::Weight, Real>;
  static constexpr int V = Policy::kVectorWidth;

  Vector<W, V> a{}, b{};
  Real offset;

  __device__ ChunkWeights(const QKNormRotaryProblem& problem, int operand, const ChunkChannels& channels, bool exists)
      : offset(problem.unit_offset ? Real(1) : Real(0)) {
    const QKNormRotaryProblem::Weight& weight = problem.weights[operand];
    const auto load = [&](int channel) -> Vector<W, V> {
      if constexpr (Policy::kHeld) {
        return load_entries<V, false>(static_cast<const W*>(weight.data), channel, 1);
      } else {
        const int64_t index = channel * weight.stride;
        return {
            problem.weights_are_wide ? static_cast<const Real*>(weight.data)[index]
                                     : widen(static_cast<const T*>(weight.data)[index])};
      }
    };
    if (exists) {
      a = load(channels.first);
      if (channels.has_second) {
        b = load(channels.second);
      }
    }
  }

  __device__ Real operator[](int i) const { return widen(i < V ? a[i] : b[i - V]) + offset; }

  __device__ void keep_packed() {
    cuda::keep_packed(a);
    cuda::keep_packed(b);
  }
};

/// Sums over the lanes of a head, for all of them. All threads of a warp take part.
template <typename... Real>
__device__ void sum_over_lanes(Real&... values) {
  for (int offset = static_cast<int>(blockDim.x) / 2; offset > 0; offset /= 2) {
    ((values += __shfl_xor_sync(0xffffffffU, values, offset)), ...);
  }
}

__device__ inline float reciprocal_root(float value) {
  return rsqrtf(value);
}
__device__ inline double reciprocal_root(double value) {
  return rsqrt(value);
}

/// The reciprocal of the root mean square of a head; NaN where its token has no row in the tables, so that all that is
/// multiplied with it is NaN.
template <typename Real>
__device__ Real reciprocal_rms(const NormScalars<Real>& scalars, Real sign_of_token, Real sum_of_squares) {
  const Real root = reciprocal_root(multiply_add(sum_of_squares, scalars.one_over_head_dim, scalars.eps));
  return sign_of_token == sign_of_token ? root : sign_of_token;
}

/// Which heads a row of lanes works on.
struct NormRows {
  int operand;
  uint32_t first, step;
  uint32_t place;  // of this block's sums: those of operand 0 come first

  __device__ explicit NormRows(const NormGrid& grid) {
    uint32_t block;
    if (grid.mix == 0) {
      operand = blockIdx.x >= grid.blocks_of_first ? 1 : 0;
      block = blockIdx.x - (operand == 0 ? 0 : grid.blocks_of_first);
    } else {
      const uint32_t before = __umulhi(blockIdx.x, grid.mix);  // blocks of operand 1
      operand = __umulhi(blockIdx.x + 1, grid.mix) > before ? 1 : 0;
      block = operand == 0 ? blockIdx.x - before : before;
    }
    step = blockDim.y;
    first = block * static_cast<uint32_t>(grid.heads_in_turn) * step + threadIdx.y;
    place = (operand == 0 ? 0 : grid.blocks_of_first) + block;
  }
};

/// Normalises, weighs and rotates a chunk in place.
template <typename T, typename Policy>
__device__ void normalise_and_rotate(
    HeadChunk<T, Policy>& x,
    const ChunkWeights<T, Policy>& weights,
    const ChunkTables<T, Policy>& tables,
    arithmetic_t<T> rstd,
    bool rotates) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  Vector<Real, V> wide[2];
#pragma unroll
  for (int p = 0; p < V; ++p) {
    const int i = first_of_pair<Policy>(p);
    const int j = second_of_pair<Policy>(p);
    const Real z1 = multiply(multiply(widen(x[i]), rstd), weights[i]);
    const Real z2 = multiply(multiply(widen(x[j]), rstd), weights[j]);
    Real y1 = z1;
    Real y2 = z2;
    tables.rotate(p, y1, y2);
    wide[i / V][i % V] = rotates ? y1 : z1;
    wide[j / V][j % V] = rotates ? y2 : z2;
  }
  x.a = narrow<T>(wide[0]);
  x.b = narrow<T>(wide[1]);
}

template <typename T, typename Policy>
__global__ void __launch_bounds__(kMaxThreads, kMinNormBlocks<Policy>) qk_norm_rotary_embedding_kernel(
    const __grid_constant__ QKNormRotaryProblem problem,
    const __grid_constant__ NormGrid grid,
    const __grid_constant__ NormScalars<arithmetic_t<T>> scalars) {
  using Real = arithmetic_t<T>;
  const NormRows rows(grid);
  const HeadOrder& order = grid.orders[rows.operand];
  // All threads of a warp meet at the shuffles: those behind the last head repeat it, and do not store.
  const bool live = rows.first < order.count;
  const HeadIndex index(order, live ? rows.first : order.count - 1);
  const RotaryProblem::Operand& operand = problem.rotary.operands[rows.operand];
  const T* in = static_cast<const T*>(operand.in) + index.offset(operand.in_strides);
  const int64_t in_stride = operand.in_strides.channel;
  const int lane = static_cast<int>(threadIdx.x);

  if constexpr (Policy::kHeld) {
    const bool exists = Policy::kWhole || lane < grid.num_chunks;
    const ChunkChannels channels = channels_of_chunk<Policy>(problem.rotary, lane);
    HeadChunk<T, Policy> x;
    if (exists) {
      x.template load<false>(in, in_stride, channels);
    }
    ChunkWeights<T, Policy> weights(problem, rows.operand, channels, exists);
    const ChunkTables<T, Policy> tables(problem.rotary, index.batch, index.seq, channels, exists);
    __syncwarp();  // so that the compiler asks for the tables before it waits for x
    Real squares = x.sum_of_squares();
    sum_over_lanes(squares);
    const Real rstd = reciprocal_rms(scalars, tables.sign, squares);
    x.keep_packed();
    weights.keep_packed();
    normalise_and_rotate(x, weights, tables, rstd, channels.rotates);
    if (exists && live) {
      T* out = static_cast<T*>(operand.out) + index.offset(operand.out_strides);
      x.store(out, operand.out_strides.channel, channels);
    }
  } else {
    T* out = static_cast<T*>(operand.out) + index.offset(operand.out_strides);
    const int64_t out_stride = operand.out_strides.channel;
    Real squares = 0;
    for (int chunk = lane; chunk < grid.num_chunks; chunk += static_cast<int>(blockDim.x)) {
      HeadChunk<T, Policy> x;
      x.template load<false>(in, in_stride, channels_of_chunk<Policy>(problem.rotary, chunk));
      squares += x.sum_of_squares();
    }
    sum_over_lanes(squares);
    const Real sign = sign_of_token<Real>(problem.rotary, index.batch, index.seq);
    const Real rstd = reciprocal_rms(scalars, sign, squares);
    for (int chunk = lane; chunk < grid.num_chunks && live; chunk += static_cast<int>(blockDim.x)) {
      const ChunkChannels channels = channels_of_chunk<Policy>(problem.rotary, chunk);
      HeadChunk<T, Policy> x;
      x.template load<false>(in, in_stride, channels);
      const ChunkTables<T, Policy> tables(problem.rotary, index.batch, index.seq, channels, /*exists=*/true);
      const ChunkWeights<T, Policy> weights(problem, rows.operand, channels, /*exists=*/true);
      normalise_and_rotate(x, weights, tables, rstd, channels.rotates);
      x.store(out, out_stride, channels);
    }
  }
}

// --- Backward -------------------------------------------------------------------------------------------------------

/// The gradient that arrives at a chunk, rotated backwards: 2 V values in the arithmetic type.
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

  /// The sum of products with the weighted input.
  __device__ Real sum_of_products(const HeadChunk<T, Policy>& x, const ChunkWeights<T, Policy>& weights) const {
    Real sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      sum = multiply_add(multiply(values[i], weights[i]), widen(x[i]), sum);
    }
    return sum;
  }

  /// Turns `x` into its gradient. Calls `add_to_weight(i, value)` with what each element adds to that of its weight.
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

/// `partial_sums` is `[blocks, D]`, or null where no weight wants a gradient; shared memory has `[blockDim.y, D]`.
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
  // The sums of this row of lanes. A channel belongs to one lane: nobody else touches its entry before the end.
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
      // Calls `body` with the gradient rotated backwards, the input and the weights of a chunk.
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

/// Threads of a block of the second kernel: as many channels as fill a sector of 32 bytes in float32, in each of so
/// many partial sums at once.
constexpr int kSumChannels = 8;
constexpr int kSumThreads = 1024;

/// The gradients of the weights from the sums of all blocks: blocks along x take channels, along y operands.
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
  // Over the threads of a warp that have the same channel, and then over the warps.
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
