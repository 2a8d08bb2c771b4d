#pragma once

#include <arguments/rotary_problem.h>
#include <cuda/detail/rotary_chunk.cuh>

// A chunk (rotary_chunk.cuh) for kernels that do more with it than to rotate it: where it lies, its elements, and
// its entries of the tables. No torch.
namespace posenc::cuda {

/// Where a chunk lies in its head. Chunks behind the rotary width do not rotate, and the last of them may be one
/// vector.
struct ChunkChannels {
  int first, second;  // channels, the first of each vector
  bool rotates, has_second;
};

template <typename Policy>
__device__ ChunkChannels channels_of_chunk(const RotaryProblem& problem, int chunk) {
  constexpr int V = Policy::kVectorWidth;
  constexpr bool kNeighbours = Policy::kInterleaved && V == 1;
  const int num_pairs = static_cast<int>(problem.num_pairs);
  ChunkChannels channels{
      kNeighbours ? 2 * chunk : chunk * V, kNeighbours ? 2 * chunk + 1 : num_pairs + chunk * V, true, true};
  const int tail_chunk = chunk - num_pairs / V;
  const int tail = static_cast<int>(problem.head_dim) - 2 * num_pairs;
  if (tail_chunk >= 0) {
    channels.rotates = false;
    channels.first = 2 * num_pairs + tail_chunk * V;
    channels.second = channels.first + (tail / V + 1) / 2 * V;
    channels.has_second = channels.second < problem.head_dim;
  }
  return channels;
}

// A chunk has 2 V elements, those of its first vector and then those of its second, and V pairs of them.

template <typename Policy>
__device__ constexpr int first_of_pair(int pair) {
  return Policy::kInterleaved ? 2 * pair : pair;
}

template <typename Policy>
__device__ constexpr int second_of_pair(int pair) {
  return Policy::kInterleaved ? 2 * pair + 1 : Policy::kVectorWidth + pair;
}

/// Where the i-th pair of a chunk is in a row of the tables.
template <typename Policy>
POSENC_HOST_DEVICE int pair_of_chunk(int chunk, int i, int num_pairs) {
  constexpr int V = Policy::kVectorWidth;
  if constexpr (Policy::kInterleaved && V > 1) {
    return i < V / 2 ? chunk * V / 2 + i : (num_pairs + chunk * V) / 2 + i - V / 2;
  } else {
    return chunk * V + i;
  }
}

/// The elements of a chunk of one head, each once.
template <typename T, typename Policy>
struct HeadChunk {
  static constexpr int V = Policy::kVectorWidth;

  Vector<T, V> a{}, b{};

  __device__ T& operator[](int i) { return i < V ? a[i] : b[i - V]; }
  __device__ const T& operator[](int i) const { return i < V ? a[i] : b[i - V]; }

  template <bool Splat>
  __device__ void load(const T* head, int64_t stride, const ChunkChannels& channels) {
    a = load_channels<V, Splat>(head, channels.first, stride);
    if (channels.has_second) {
      b = load_channels<V, Splat>(head, channels.second, stride);
    }
  }

  __device__ void store(T* head, int64_t stride, const ChunkChannels& channels) const {
    store_channels<V>(head, channels.first, stride, a);
    if (channels.has_second) {
      store_channels<V>(head, channels.second, stride, b);
    }
  }

  __device__ arithmetic_t<T> sum_of_squares() const {
    arithmetic_t<T> sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * V; ++i) {
      sum = multiply_add(widen((*this)[i]), widen((*this)[i]), sum);
    }
    return sum;
  }

  __device__ void keep_packed() {
    cuda::keep_packed(a);
    cuda::keep_packed(b);
  }
};

/// -1 to rotate backwards; NaN where the token has no row in the tables. With several axes it may have some of its
/// rows, and it is the pairs that become NaN.
template <typename Real>
__device__ Real sign_of_token(const RotaryProblem& problem, int64_t batch, int64_t seq) {
  return problem.positions.num_axes > 0 ? problem.conjugate ? Real(-1) : Real(1)
                                        : table_row<Real>(problem, batch, seq).sign;
}

/// The entries of the tables for the V pairs of a chunk: in half pairing those of its neighbouring channels,
/// interleaved those of the first vector and then those of the second. Zero where the chunk does not exist or does not
/// rotate. `Policy::kAxes`: positions may have several axes.
template <typename T, typename Policy>
struct ChunkTables {
  using Real = arithmetic_t<T>;
  static constexpr int V = Policy::kVectorWidth;

  Vector<Real, V> cos{}, sin{};
  Real sign;  // of all sines: multiplied when they are used, so that nothing waits for them before that

  __device__ ChunkTables(
      const RotaryProblem& problem,
      int64_t batch,
      int64_t seq,
      const ChunkChannels& channels,
      bool exists)
      : sign(problem.conjugate ? Real(-1) : Real(1)) {
    const bool read = exists && channels.rotates;
    if (Policy::kAxes && problem.positions.num_axes > 0) {
      if (read) {
        load_by_axes(problem, batch, seq, channels);
      }
      return;
    }
    *this = ChunkTables(problem, table_row<Real>(problem, batch, seq), channels, exists);
  }

  /// The entries of a row that is known already.
  __device__ ChunkTables(
      const RotaryProblem& problem,
      const TableRow<Real>& row,
      const ChunkChannels& channels,
      bool exists)
      : sign(row.sign) {
    if (exists && channels.rotates) {
      cos = load_row(static_cast<const Real*>(problem.cos.data) + row.cos, channels, problem.cos.stride_pair);
      sin = load_row(static_cast<const Real*>(problem.sin.data) + row.sin, channels, problem.sin.stride_pair);
    }
  }

  /// Rotates a pair in place. The order of rounding is that of `rotate_pair`.
  __device__ void rotate(int pair, Real& x1, Real& x2) const {
    const Real s = sign * sin[pair];
    const Real y1 = multiply_add(x1, cos[pair], -multiply(x2, s));
    x2 = multiply_add(x1, s, multiply(x2, cos[pair]));
    x1 = y1;
  }

 private:
  static constexpr bool kPairsInsideVector = Policy::kInterleaved && V > 1;

  /// The number of a pair in its head.
  __device__ static int number_of_pair(const ChunkChannels& channels, int pair) {
    if constexpr (kPairsInsideVector) {
      return pair < V / 2 ? channels.first / 2 + pair : channels.second / 2 + pair - V / 2;
    } else {
      return Policy::kInterleaved ? channels.first / 2 : channels.first + pair;
    }
  }

  __device__ static Vector<Real, V> load_row(const Real* row, const ChunkChannels& channels, int64_t stride) {
    if constexpr (kPairsInsideVector) {
      const auto of_first = load_entries<V / 2, false>(row, channels.first / 2, stride);
      const auto of_second = load_entries<V / 2, false>(row, channels.second / 2, stride);
      Vector<Real, V> entries;
#pragma unroll
      for (int i = 0; i < V / 2; ++i) {
        entries[i] = of_first[i];
        entries[V / 2 + i] = of_second[i];
      }
      return entries;
    } else {
      return load_entries<V, V == 1>(row, number_of_pair(channels, 0), stride);
    }
  }

  /// Each pair from the row of its axis. Entry by entry: neighbours may read different rows, and what the heads of a
  /// token share comes from the cache. Rows are numbered by 31 bits, for the sake of registers.
  __device__ void load_by_axes(
      const RotaryProblem& problem,
      int64_t batch,
      int64_t seq,
      const ChunkChannels& channels) {
    const PositionsView& positions = problem.positions;
    int32_t rows[kMaxAxes];
#pragma unroll
    for (int axis = 0; axis < kMaxAxes; ++axis) {
      int64_t position = -1;
      if (axis < positions.num_axes) {
        position = load_position(positions, axis, batch, seq);
      }
      rows[axis] = position < problem.table_rows ? static_cast<int32_t>(max(position, int64_t{-1})) : -1;
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int pair = number_of_pair(channels, i);
      const int32_t axis = problem.pair_axes.axis(pair);
      const int32_t low = (axis & 1) != 0 ? rows[1] : rows[0];
      const int32_t high = (axis & 1) != 0 ? rows[3] : rows[2];
      const int32_t row = (axis & 2) != 0 ? high : low;
      cos[i] = sin[i] = static_cast<Real>(NAN);
      if (row >= 0) {
        cos[i] =
            static_cast<const Real*>(problem.cos.data)[row * problem.cos.stride_row + pair * problem.cos.stride_pair];
        sin[i] =
            static_cast<const Real*>(problem.sin.data)[row * problem.sin.stride_row + pair * problem.sin.stride_pair];
      }
    }
  }
};

}  // namespace posenc::cuda
