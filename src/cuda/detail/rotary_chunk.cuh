#pragma once

#include <contract/rotary_problem.h>
#include <cuda/detail/vector.cuh>
#include <cuda/detail/vector_width.h>

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
};

/// The rows of `cos` and `sin` that one token reads, as offsets: from a pointer chosen at run time the compiler
/// would not know that it points to global memory. Where there is no such row, `sign` is NaN, and so is what it
/// multiplies.
template <typename Real>
struct TableRow {
  int64_t cos, sin;
  Real sign;  // of sin: -1 to rotate backwards
};

template <typename Real>
__device__ TableRow<Real> table_row(const RotaryProblem& problem, int64_t batch, int64_t seq) {
  const Real sign = problem.conjugate ? Real(-1) : Real(1);
  const PositionsView& positions = problem.positions;
  if (positions.data == nullptr) {
    return {
        batch * problem.cos.stride_batch + seq * problem.cos.stride_row,
        batch * problem.sin.stride_batch + seq * problem.sin.stride_row,
        sign};
  }
  const int64_t index = batch * positions.stride_batch + seq * positions.stride_seq;
  const int64_t position = positions.is_int64 ? static_cast<const int64_t*>(positions.data)[index]
                                              : static_cast<const int32_t*>(positions.data)[index];
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

/// One chunk that rotates. All loads come before the first use of any, so that a thread waits for memory once.
template <int V, bool Interleaved, bool Splat, typename T>
__device__ void rotate_chunk(const RotaryProblem& problem, const Place<T>& place, int chunk) {
  using Real = arithmetic_t<T>;
  constexpr bool kPairsInsideVector = Interleaved && V > 1;
  constexpr bool kNeighbours = Interleaved && V == 1;
  constexpr int kPairs = kPairsInsideVector ? V / 2 : V;  // of one vector
  const int first = kNeighbours ? 2 * chunk : chunk * V;
  const int second = kNeighbours ? 2 * chunk + 1 : static_cast<int>(problem.num_pairs) + chunk * V;
  const int pair = kPairsInsideVector ? first / 2 : chunk * V;
  const int64_t cos_stride = problem.cos.stride_pair;
  const int64_t sin_stride = problem.sin.stride_pair;

  Vector<T, V> a = load_channels<V, Splat>(place.in, first, place.in_stride);
  Vector<T, V> b = load_channels<V, Splat>(place.in, second, place.in_stride);
  const TableRow<Real> row = table_row<Real>(problem, place.batch, place.seq);
  const Real* cos = static_cast<const Real*>(problem.cos.data) + row.cos;
  const Real* sin = static_cast<const Real*>(problem.sin.data) + row.sin;
  const auto cos_a = load_entries<kPairs, V == 1>(cos, pair, cos_stride);
  const auto sin_a = load_entries<kPairs, V == 1>(sin, pair, sin_stride);
  if constexpr (kPairsInsideVector) {
    const auto cos_b = load_entries<kPairs, false>(cos, second / 2, cos_stride);
    const auto sin_b = load_entries<kPairs, false>(sin, second / 2, sin_stride);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      rotate_pair(a[2 * i], a[2 * i + 1], cos_a[i], row.sign * sin_a[i]);
      rotate_pair(b[2 * i], b[2 * i + 1], cos_b[i], row.sign * sin_b[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      rotate_pair(a[i], b[i], cos_a[i], row.sign * sin_a[i]);
    }
  }
  store_channels<V>(place.out, first, place.out_stride, a);
  store_channels<V>(place.out, second, place.out_stride, b);
}

/// One chunk behind the rotary width, number `chunk` of those: a copy, or NaN where the token has no row.
template <int V, typename T>
__device__ void copy_chunk(const RotaryProblem& problem, const Place<T>& place, int chunk) {
  using Real = arithmetic_t<T>;
  const int rotary_dim = 2 * static_cast<int>(problem.num_pairs);
  const int head_dim = static_cast<int>(problem.head_dim);
  const int stride = ((head_dim - rotary_dim) / V + 1) / 2 * V;
  const int first = rotary_dim + chunk * V;
  const Real sign = table_row<Real>(problem, place.batch, place.seq).sign;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int channel = first + i * stride;
    if (channel < head_dim) {
      const Vector<T, V> tail = place.in_stride == 0 ? splat<V>(*place.in)
                                                     : load_channels<V, false>(place.in, channel, place.in_stride);
      store_channels<V>(place.out, channel, place.out_stride, sign == sign ? tail : splat<V>(narrow<T>(sign)));
    }
  }
}

}  // namespace posenc::cuda
