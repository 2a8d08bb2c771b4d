#pragma once

#include <arguments/qk_norm_rotary_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/rotary_chunk.cuh>

#include <type_traits>

// RMSNorm over heads and rotation in one launch.
//
// Lanes along x, a power of two and at most a warp, share a head; heads are along y. A lane *holds* one chunk
// (rotary_chunk.cuh) in registers from its only load to its only store, and the sums of a head are computed by
// shuffles. Heads with more chunks than a warp has lanes, and heads whose strides allow no vectors, are read twice
// instead, element by element.
namespace posenc::cuda {

/// Blocks that an SM holds at least. A chunk, its row of the tables and its weights take 64 registers, and 80 with the
/// incoming gradient and the sums for the weights; with one more block they spill. 56 registers suffice for whole heads
/// whose weights are as narrow as the elements: 1.03 instead of 1.09 times the copy, measured on an H100 with bfloat16,
/// 8192 tokens, 32 and 8 heads of 128. Rows of several axes take more.
template <typename Policy>
constexpr int kMinNormBlocks = Policy::kHeld && Policy::kAxes ? 6
    : Policy::kWhole && Policy::kNarrowWeights                ? 9
                                                              : 8;
template <typename Policy>
constexpr int kMinNormBackwardBlocks = Policy::kHeld && Policy::kAxes ? 4 : 6;

/// Sums of channels that fit the shared memory of a block: float64 in the 48 KiB that need no opt-in. And the largest
/// head, which leaves some of it for other use.
constexpr int64_t kMaxNormSums = 6144;
constexpr int64_t kMaxNormHeadDim = 4096;

/// Constants of a launch. With a vector width of 1 heads are read twice, with wider vectors they are held. `IsSplat`:
/// the incoming gradient has one value for all channels of a head, as after sum(). `WeightType`, the dtype of the
/// weights, is used for held chunks only; a choice at run time would make the arithmetic wait for the loads. `IsWhole`:
/// each lane has a chunk, and all chunks rotate.
template <int VectorWidth, bool IsInterleaved, bool IsSplat, bool HasAxes, typename WeightType, bool IsWhole = false>
struct NormPolicy {
  static constexpr int kVectorWidth = VectorWidth;
  static constexpr bool kInterleaved = IsInterleaved;
  static constexpr bool kSplat = IsSplat;
  static constexpr bool kAxes = HasAxes;  // positions may have several axes
  static constexpr bool kHeld = VectorWidth > 1;
  static constexpr bool kWhole = IsWhole;
  static constexpr bool kTail = !IsWhole;
  static constexpr bool kNarrowWeights = VectorWidth * static_cast<int>(sizeof(WeightType)) <= kMaxVectorBytes;
  using Weight = WeightType;
};

/// Numbering of the heads of an operand in the order of its memory.
struct HeadOrder {
  Divider inner;   // number of heads, or with `tokens_first` of tokens
  Divider middle;  // number of tokens, or with `tokens_first` of heads
  uint32_t count;  // number of heads of all tokens and batches
  bool tokens_first;
};

/// Assignment of blocks to heads: `blocks_of_first` blocks process operand 0, all others operand 1.
struct NormGrid {
  HeadOrder orders[2];
  uint32_t blocks_of_first;
  int32_t num_chunks;     // of one head
  int32_t heads_in_turn;  // heads that a row of lanes processes one after the other
  /// If not 0: the share of blocks of operand 1, in units of 2^-32. They are interleaved with those of operand 0, so
  /// that the heads of a token are processed at about the same time and its row of the tables is read from memory once
  /// (1.09 instead of 1.15 times the copy, measured on an H100).
  uint32_t mix;
};

/// Constants of all heads, precomputed on the host to save a conversion and a division in each thread.
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

/// The weights of the elements of a chunk. They are kept in their own dtype and widened at each use.
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

/// Replaces each value by its sum over the lanes of a head. All threads of a warp take part.
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

/// The reciprocal of the root mean square of a head. It is NaN if the token has no row in the tables, which makes the
/// whole head NaN.
template <typename Real>
__device__ Real reciprocal_rms(const NormScalars<Real>& scalars, Real sign_of_token, Real sum_of_squares) {
  const Real root = reciprocal_root(multiply_add(sum_of_squares, scalars.one_over_head_dim, scalars.eps));
  return sign_of_token == sign_of_token ? root : sign_of_token;
}

/// The heads that a row of lanes processes.
struct NormRows {
  int operand;
  uint32_t first, step;
  uint32_t place;  // index of the sums of this block; those of operand 0 come first

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

/// Normalises a chunk, multiplies it by its weights and rotates it, in place.
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
  // All threads of a warp take part in the shuffles. Threads behind the last head compute it again and do not store.
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
    __syncwarp();  // makes the compiler issue the loads of the tables before it waits for x
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

}  // namespace posenc::cuda
