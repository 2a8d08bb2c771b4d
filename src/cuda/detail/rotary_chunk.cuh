#pragma once

#include <arguments/rotary_problem.h>
#include <cuda/detail/vector_width.h>
#include <cuda/detail/vector.cuh>

// The unit of work of the rotary kernel. No torch.
//
// A *chunk* is two vectors of V elements, one in each half of the rotary width, so that neighbouring threads
// touch neighbouring addresses in either pairing. With half pairing the vectors pair with each other. Interleaved
// pairs lie inside each vector; with V = 1 the chunk is one pair of neighbours. Chunks after those copy the tail.
//
//     head of D = 12, R = 8, V = 2      | 0 0 | 1 1 | 0 0 | 1 1 | 2 2 | 2 2 |     numbers are chunks
//                                       |   rotary width, R     |   tail    |
namespace posenc::cuda {

/// One head of one token.
template <typename T>
struct Place {
  const T* in;
  T* out;
  int64_t in_stride, out_stride;  // of channels
  int64_t batch, seq;
  bool copied;  // not rotated
};

/// The rows of `cos` and `sin` that one token reads, as offsets: from a pointer chosen at run time the compiler
/// would not know that it points to global memory. Where there is no such row, `sign` is NaN, and so is what it
/// multiplies.
template <typename Real>
struct TableRow {
  int64_t cos, sin;
  Real sign;  // of sin: -1 to rotate backwards
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

/// V channels from `channel` on: neighbours in memory, or where `Splat`, one value for all, as in the gradient of a
/// sum. With V = 1 any stride will do.
template <int V, bool Splat, typename T>
__device__ Vector<T, V> load_channels(const T* head, int channel, int64_t stride) {
  if constexpr (V == 1) {
    return {head[channel * stride]};
  } else if constexpr (Splat) {
    return splat<V>(*head);
  } else {
    return load<V>(head + channel);
  }
}

template <int V, typename T>
__device__ void store_channels(T* head, int channel, int64_t stride, const Vector<T, V>& vector) {
  if constexpr (V == 1) {
    head[channel * stride] = vector[0];
  } else {
    store<V>(head + channel, vector);
  }
}

/// Entries of a table row for N neighbouring pairs.
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

/// Rotates one pair in place. The order of rounding is spelled out, so that every variant gives the same bits.
template <typename T, typename Real>
__device__ void rotate_pair(T& x1, T& x2, Real cos, Real sin) {
  const Real wide1 = widen(x1);
  const Real wide2 = widen(x2);
  x1 = narrow<T>(multiply_add(wide1, cos, -multiply(wide2, sin)));
  x2 = narrow<T>(multiply_add(wide1, sin, multiply(wide2, cos)));
}

/// Rotates the pairs of two vectors and stores them. Half pairing needs the entries of `a` only.
template <typename Policy, typename T, typename Entries, typename Real>
__device__ void rotate_and_store(
    const Place<T>& place,
    int first,
    int second,
    Vector<T, Policy::kVectorWidth> a,
    Vector<T, Policy::kVectorWidth> b,
    const Entries& cos_a,
    const Entries& sin_a,
    Real sign_a,
    const Entries& cos_b,
    const Entries& sin_b,
    Real sign_b) {
  constexpr int V = Policy::kVectorWidth;
  if constexpr (Policy::kInterleaved && V > 1) {
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      rotate_pair(a[2 * i], a[2 * i + 1], cos_a[i], sign_a * sin_a[i]);
      rotate_pair(b[2 * i], b[2 * i + 1], cos_b[i], sign_b * sin_b[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      rotate_pair(a[i], b[i], cos_a[i], sign_a * sin_a[i]);
    }
  }
  store_channels<V>(place.out, first, place.out_stride, a);
  store_channels<V>(place.out, second, place.out_stride, b);
}

/// Rotates a chunk whose pairs choose among the axes of the positions, all of a vector the same one, as in the sections
/// of Qwen2-VL. Vectors that mix axes are for rotary_stage.cuh.
template <typename Policy, typename T>
__device__ void rotate_chunk_by_axes(
    const RotaryProblem& problem,
    const Place<T>& place,
    int first,
    int second,
    const Vector<T, Policy::kVectorWidth>& a,
    const Vector<T, Policy::kVectorWidth>& b,
    int pair_a,
    int pair_b) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr bool kTwo = Policy::kInterleaved && V > 1;  // vectors with pairs, and so an axis, of their own
  constexpr int kPairs = kTwo ? V / 2 : V;
  const auto row_of = [&](int pair) {
    return table_row<Real>(problem, place.batch, place.seq, problem.pair_axes.axis(pair));
  };
  const auto load_from = [&](const RotaryTable& table, int64_t row, int pair) {
    return load_entries<kPairs, V == 1>(static_cast<const Real*>(table.data) + row, pair, table.stride_pair);
  };
  const TableRow<Real> row_a = row_of(pair_a);
  const TableRow<Real> row_b = kTwo ? row_of(pair_b) : row_a;
  const auto cos_a = load_from(problem.cos, row_a.cos, pair_a);
  const auto sin_a = load_from(problem.sin, row_a.sin, pair_a);
  const auto cos_b = kTwo ? load_from(problem.cos, row_b.cos, pair_b) : cos_a;
  const auto sin_b = kTwo ? load_from(problem.sin, row_b.sin, pair_b) : sin_a;
  rotate_and_store<Policy>(place, first, second, a, b, cos_a, sin_a, row_a.sign, cos_b, sin_b, row_b.sign);
}

/// Rotates one chunk, or copies it where it lies behind the rotary width or its tensor is only copied. All loads come
/// before the first use of any, so that a thread waits for memory once. Where the token has no row in the tables, all
/// of it becomes NaN.
template <typename Policy, typename T>
__device__ void rotate_chunk(const RotaryProblem& problem, const Place<T>& place, int chunk) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr bool kPairsInsideVector = Policy::kInterleaved && V > 1;
  constexpr bool kNeighbours = Policy::kInterleaved && V == 1;
  constexpr int kPairs = kPairsInsideVector ? V / 2 : V;  // of one vector
  const int num_pairs = static_cast<int>(problem.num_pairs);

  int first = kNeighbours ? 2 * chunk : chunk * V;
  int second = kNeighbours ? 2 * chunk + 1 : num_pairs + chunk * V;
  bool rotates = true;
  bool has_second = true;
  if constexpr (Policy::kCopies) {
    const int tail_chunk = chunk - num_pairs / V;
    const int tail = static_cast<int>(problem.head_dim) - 2 * num_pairs;
    if (tail_chunk >= 0) {
      rotates = false;
      first = 2 * num_pairs + tail_chunk * V;
      second = first + (tail / V + 1) / 2 * V;
      has_second = second < problem.head_dim;
    }
    rotates = rotates && !place.copied;
  }

  Vector<T, V> a = load_channels<V, Policy::kSplat>(place.in, first, place.in_stride);
  Vector<T, V> b{};  // not a copy of a, which would wait for it
  if (has_second) {
    b = load_channels<V, Policy::kSplat>(place.in, second, place.in_stride);
  }
  const int pair = kPairsInsideVector ? first / 2 : chunk * V;
  if constexpr (Policy::kAxes) {  // the tail passes through: it has no axis, and so no position
    if (rotates) {
      rotate_chunk_by_axes<Policy>(problem, place, first, second, a, b, pair, second / 2);
      return;
    }
    store_channels<V>(place.out, first, place.out_stride, a);
    if (has_second) {
      store_channels<V>(place.out, second, place.out_stride, b);
    }
  } else {
    const TableRow<Real> row = table_row<Real>(problem, place.batch, place.seq);
    // Each branch stores for itself: where they met before the stores, the compiler would unpack the vectors, and so
    // wait for them, before the branch (1.13 instead of less than 1.05 times the copy with a tail, measured on an
    // H200).
    if (!rotates) {
      if (row.sign != row.sign && !place.copied) {
        a = b = splat<V>(narrow<T>(row.sign));
      }
      store_channels<V>(place.out, first, place.out_stride, a);
      if (has_second) {
        store_channels<V>(place.out, second, place.out_stride, b);
      }
      return;
    }
    const Real* cos = static_cast<const Real*>(problem.cos.data) + row.cos;
    const Real* sin = static_cast<const Real*>(problem.sin.data) + row.sin;
    const auto cos_a = load_entries<kPairs, V == 1>(cos, pair, problem.cos.stride_pair);
    const auto sin_a = load_entries<kPairs, V == 1>(sin, pair, problem.sin.stride_pair);
    if constexpr (kPairsInsideVector) {
      const auto cos_b = load_entries<kPairs, false>(cos, second / 2, problem.cos.stride_pair);
      const auto sin_b = load_entries<kPairs, false>(sin, second / 2, problem.sin.stride_pair);
      rotate_and_store<Policy>(place, first, second, a, b, cos_a, sin_a, row.sign, cos_b, sin_b, row.sign);
    } else {
      rotate_and_store<Policy>(place, first, second, a, b, cos_a, sin_a, row.sign, cos_a, sin_a, row.sign);
    }
  }
}

}  // namespace posenc::cuda
