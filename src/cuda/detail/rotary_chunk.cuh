#pragma once

#include <arguments/rotary_problem.h>
#include <cuda/detail/vector_width.h>
#include <cuda/detail/vector.cuh>

// The unit of work of all rotary kernels. No torch.
//
// A *chunk* is two vectors of V elements, one in each half of the rotary width, so that neighbouring threads access
// neighbouring addresses in either pairing. With half pairing the two vectors pair with each other. Interleaved pairs
// lie inside each vector; with V = 1 the chunk is one pair of neighbouring channels. The last chunks hold the tail, the
// channels behind the rotary width, which are copied.
//
//     head of D = 12, R = 8, V = 2      | 0 0 | 1 1 | 0 0 | 1 1 | 2 2 | 2 2 |     numbers are chunks
//                                       |   rotary width, R     |   tail    |
//
// A `Policy` has the constants `kVectorWidth` (V), `kInterleaved`, `kAxes` (positions may have several axes) and
// `kTail` (heads may have a tail).
namespace posenc::cuda {

/// The channels of a chunk.
struct ChunkChannels {
  int first, second;  // the first channel of each vector
  bool rotates;       // false in the tail
  bool has_second;    // false where the tail ends after the first vector
};

template <typename Policy>
__device__ ChunkChannels channels_of_chunk(const RotaryProblem& problem, int chunk) {
  constexpr int V = Policy::kVectorWidth;
  constexpr bool kNeighbours = Policy::kInterleaved && V == 1;
  const int num_pairs = static_cast<int>(problem.num_pairs);
  ChunkChannels channels{
      kNeighbours ? 2 * chunk : chunk * V, kNeighbours ? 2 * chunk + 1 : num_pairs + chunk * V, true, true};
  if constexpr (Policy::kTail) {
    const int tail_chunk = chunk - num_pairs / V;
    const int tail = static_cast<int>(problem.head_dim) - 2 * num_pairs;
    if (tail_chunk >= 0) {
      channels.rotates = false;
      channels.first = 2 * num_pairs + tail_chunk * V;
      channels.second = channels.first + (tail / V + 1) / 2 * V;
      channels.has_second = channels.second < problem.head_dim;
    }
  }
  return channels;
}

// Elements of a chunk are numbered 0 to 2 V - 1, first vector first; its pairs are numbered 0 to V - 1.

/// Whether both elements of a pair are in one vector.
template <typename Policy>
constexpr bool kPairsInsideVector = Policy::kInterleaved && Policy::kVectorWidth > 1;

template <typename Policy>
__device__ constexpr int first_of_pair(int pair) {
  return Policy::kInterleaved ? 2 * pair : pair;
}

template <typename Policy>
__device__ constexpr int second_of_pair(int pair) {
  return Policy::kInterleaved ? 2 * pair + 1 : Policy::kVectorWidth + pair;
}

/// The number of pair `i` of a chunk in its head, which is its column in the tables.
template <typename Policy>
POSENC_HOST_DEVICE int pair_of_chunk(int chunk, int i, int num_pairs) {
  constexpr int V = Policy::kVectorWidth;
  if constexpr (kPairsInsideVector<Policy>) {
    return i < V / 2 ? chunk * V / 2 + i : (num_pairs + chunk * V) / 2 + i - V / 2;
  } else {
    return chunk * V + i;
  }
}

// --- Elements -------------------------------------------------------------------------------------------------------

/// V channels from `channel` on: contiguous, or with `Splat` one value for all, as in the gradient of a sum. V = 1
/// admits any stride.
template <int V, bool Splat, typename T>
__device__ Vector<T, V> load_channels(const T* head, int channel, int64_t stride) {
  if constexpr (V > 1 && Splat) {
    return splat<V>(*head);
  } else {
    return load_strided<V>(head, channel, stride);
  }
}

/// The elements of a chunk of one head.
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
    store_strided<V>(head, channels.first, stride, a);
    if (channels.has_second) {
      store_strided<V>(head, channels.second, stride, b);
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

/// Rotates one pair in place. The order of rounding is explicit, so that all kernels give the same bits.
template <typename T, typename Real>
__device__ void rotate_pair(T& x1, T& x2, Real cos, Real sin) {
  const Real wide1 = widen(x1);
  const Real wide2 = widen(x2);
  x1 = narrow<T>(multiply_add(wide1, cos, -multiply(wide2, sin)));
  x2 = narrow<T>(multiply_add(wide1, sin, multiply(wide2, cos)));
}

// --- Tables ---------------------------------------------------------------------------------------------------------

/// The rows of `cos` and `sin` that one token reads. They are offsets, because the compiler does not know that a
/// pointer chosen at run time points to global memory.
template <typename Real>
struct TableRow {
  int64_t cos, sin;
  Real sign;  // factor of sin: -1 to rotate backwards; NaN if there is no such row
};

__device__ inline int64_t load_position(const PositionsView& positions, int64_t axis, int64_t batch, int64_t seq) {
  const int64_t index = axis * positions.stride_axis + batch * positions.stride_batch + seq * positions.stride_seq;
  return positions.is_int64 ? static_cast<const int64_t*>(positions.data)[index]
                            : static_cast<const int32_t*>(positions.data)[index];
}

template <typename Real>
__device__ TableRow<Real> table_row(const RotaryProblem& problem, int64_t batch, int64_t seq, int64_t axis = 0) {
  const Real sign = problem.conjugate ? Real(-1) : Real(1);
  const PositionsView& positions = problem.positions;
  if (positions.data == nullptr) {
    return {
        batch * problem.cos.stride_batch + seq * problem.cos.stride_row,
        batch * problem.sin.stride_batch + seq * problem.sin.stride_row, sign};
  }
  const int64_t position = load_position(positions, axis, batch, seq);
  const bool exists = position >= 0 && position < problem.table_rows;
  const int64_t row = exists ? position : 0;
  return {row * problem.cos.stride_row, row * problem.sin.stride_row, exists ? sign : static_cast<Real>(NAN)};
}

/// The sign of the row that a token reads. With several axes a token reads several rows, and pairs without a row become
/// NaN one by one: then the sign is never NaN.
template <typename Real>
__device__ Real sign_of_token(const RotaryProblem& problem, int64_t batch, int64_t seq) {
  return problem.positions.num_axes > 0 ? problem.conjugate ? Real(-1) : Real(1)
                                        : table_row<Real>(problem, batch, seq).sign;
}

/// N neighbouring entries of a row of a table.
template <int N, bool AnyStride, typename Real>
__device__ Vector<Real, N> load_entries(const Real* row, int pair, int64_t stride) {
  if constexpr (AnyStride) {
    static_assert(N == 1, "only single entries can be strided");
    return {row[pair * stride]};
  } else {
    Vector<Real, N> entries;
    constexpr int kStep = kTableVector<Real, N>;
#pragma unroll
    for (int i = 0; i < N; i += kStep) {
      const Vector<Real, kStep> part = load<kStep>(row + pair + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        entries[i + j] = part[j];
      }
    }
    return entries;
  }
}

/// The entries of the tables for the V pairs of a chunk; zero where the chunk does not exist or does not rotate.
template <typename T, typename Policy>
struct ChunkTables {
  using Real = arithmetic_t<T>;
  static constexpr int V = Policy::kVectorWidth;

  Vector<Real, V> cos{}, sin{};
  // Factors of sin for the pairs of each vector. They are multiplied when sin is used: a product here would wait for
  // the loads.
  Real sign, sign_of_second;

  /// The entries for one token. Where positions have several axes, each pair reads the row of its axis, entry by entry.
  __device__ ChunkTables(
      const RotaryProblem& problem,
      int64_t batch,
      int64_t seq,
      const ChunkChannels& channels,
      bool exists)
      : sign(problem.conjugate ? Real(-1) : Real(1)), sign_of_second(sign) {
    const bool read = exists && channels.rotates;
    if (Policy::kAxes && problem.positions.num_axes > 0) {
      if (read) {
        load_by_axes(problem, batch, seq, channels);
      }
      return;
    }
    *this = ChunkTables(problem, table_row<Real>(problem, batch, seq), channels, exists);
  }

  /// The entries of one row.
  __device__ ChunkTables(
      const RotaryProblem& problem,
      const TableRow<Real>& row,
      const ChunkChannels& channels,
      bool exists)
      : sign(row.sign), sign_of_second(row.sign) {
    if (exists && channels.rotates) {
      load_rows(problem, row, row, channels);
    }
  }

  /// The entries of two rows: the pairs of each vector read the row of their axis, all of a vector the same one.
  __device__ ChunkTables(
      const RotaryProblem& problem,
      const TableRow<Real>& row_of_first,
      const TableRow<Real>& row_of_second,
      const ChunkChannels& channels)
      : sign(row_of_first.sign), sign_of_second(row_of_second.sign) {
    load_rows(problem, row_of_first, row_of_second, channels);
  }

  /// The entries for one token whose positions have several axes, where all pairs of a vector read the same axis, as in
  /// the sections of Qwen2-VL.
  __device__ static ChunkTables by_axis_of_vector(
      const RotaryProblem& problem,
      int64_t batch,
      int64_t seq,
      const ChunkChannels& channels) {
    const auto row_of = [&](int pair) {
      return table_row<Real>(problem, batch, seq, problem.pair_axes.axis(number_of_pair(channels, pair)));
    };
    const TableRow<Real> row_of_first = row_of(0);
    return ChunkTables(problem, row_of_first, kPairsInsideVector<Policy> ? row_of(V / 2) : row_of_first, channels);
  }

  /// Rotates pair `pair` in place.
  template <typename Element>
  __device__ void rotate(int pair, Element& x1, Element& x2) const {
    const bool in_second = kPairsInsideVector<Policy> && pair >= V / 2;
    rotate_pair(x1, x2, cos[pair], (in_second ? sign_of_second : sign) * sin[pair]);
  }

 private:
  /// The number of pair `pair` of the chunk in its head.
  __device__ static int number_of_pair(const ChunkChannels& channels, int pair) {
    if constexpr (kPairsInsideVector<Policy>) {
      return pair < V / 2 ? channels.first / 2 + pair : channels.second / 2 + pair - V / 2;
    } else {
      return Policy::kInterleaved ? channels.first / 2 : channels.first + pair;
    }
  }

  __device__ void load_rows(
      const RotaryProblem& problem,
      const TableRow<Real>& row_of_first,
      const TableRow<Real>& row_of_second,
      const ChunkChannels& channels) {
    const auto* const cosines = static_cast<const Real*>(problem.cos.data);
    const auto* const sines = static_cast<const Real*>(problem.sin.data);
    if constexpr (kPairsInsideVector<Policy>) {
      load_halves(cos, cosines + row_of_first.cos, cosines + row_of_second.cos, channels);
      load_halves(sin, sines + row_of_first.sin, sines + row_of_second.sin, channels);
    } else {
      const int pair = number_of_pair(channels, 0);
      cos = load_entries<V, V == 1>(cosines + row_of_first.cos, pair, problem.cos.stride_pair);
      sin = load_entries<V, V == 1>(sines + row_of_first.sin, pair, problem.sin.stride_pair);
    }
  }

  __device__ static void load_halves(
      Vector<Real, V>& entries,
      const Real* row_of_first,
      const Real* row_of_second,
      const ChunkChannels& channels) {
    const auto of_first = load_entries<V / 2, false>(row_of_first, channels.first / 2, 1);
    const auto of_second = load_entries<V / 2, false>(row_of_second, channels.second / 2, 1);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      entries[i] = of_first[i];
      entries[V / 2 + i] = of_second[i];
    }
  }

  /// Each pair from the row of its axis, entry by entry, because neighbouring pairs may read different rows. The heads
  /// of a token share the entries through the cache. Row numbers are int32 to save registers.
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
