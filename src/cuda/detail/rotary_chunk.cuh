#pragma once

#include <contract/rotary_problem.h>
#include <cuda/detail/vector.cuh>
#include <cuda/detail/vector_width.h>

// The unit of work of the rotary kernels. No torch.
//
// A *chunk* is two vectors of V elements, one in each half of the rotary width, so that neighbouring threads
// touch neighbouring addresses in either pairing. With half pairing the vectors pair with each other. Interleaved
// pairs lie inside each vector; with V = 1 the chunk is one pair of neighbours. Chunks after those copy the tail.
//
//     head of D = 12, R = 8, V = 2      | 0 0 | 1 1 | 0 0 | 1 1 | 2 2 | 2 2 |     numbers are chunks
//                                       |   rotary width, R     |   tail    |
namespace posenc::cuda {

/// The rows of `cos` and `sin` that one token reads.
struct TableRow {
  int64_t cos_offset, sin_offset;
  bool exists;
};

__device__ inline TableRow table_row(const RotaryProblem& problem, int64_t batch, int64_t seq) {
  const RotaryTable& cos = problem.cos;
  const RotaryTable& sin = problem.sin;
  const PositionsView& positions = problem.positions;
  if (positions.data == nullptr) {
    return {
        batch * cos.stride_batch + seq * cos.stride_row, batch * sin.stride_batch + seq * sin.stride_row, true};
  }
  const int64_t index = batch * positions.stride_batch + seq * positions.stride_seq;
  const int64_t position = positions.is_int64 ? static_cast<const int64_t*>(positions.data)[index]
                                              : static_cast<const int32_t*>(positions.data)[index];
  const bool exists = position >= 0 && position < problem.table_rows;
  const int64_t row = exists ? position : 0;
  return {row * cos.stride_row, row * sin.stride_row, exists};
}

template <typename T, int V, bool Interleaved>
struct RotaryChunk {
  using Real = arithmetic_t<T>;
  static constexpr bool kPairsInsideVector = Interleaved && V > 1;
  static constexpr int kPairsPerVector = kPairsInsideVector ? V / 2 : V;

  __device__ RotaryChunk(int index, int num_pairs, int head_dim) {
    const int rotary_chunks = num_pairs / V;
    rotates = index < rotary_chunks;
    if (rotates) {
      constexpr bool kNeighbours = Interleaved && V == 1;
      first = kNeighbours ? 2 * index : index * V;
      second = kNeighbours ? 2 * index + 1 : num_pairs + index * V;
      has_second = true;
    } else {
      const int rotary_dim = 2 * num_pairs;
      const int tail_vectors = (head_dim - rotary_dim) / V;
      first = rotary_dim + (index - rotary_chunks) * V;
      second = first + (tail_vectors + 1) / 2 * V;
      has_second = second < head_dim;
    }
    first_pair = kPairsInsideVector ? first / 2 : index * V;
    second_pair = kPairsInsideVector ? second / 2 : first_pair;
  }

  __device__ void load(const T* head, int64_t stride) {
    a = load_channels(head, first, stride);
    if (has_second) {
      b = load_channels(head, second, stride);
    }
  }

  __device__ void rotate(const RotaryProblem& problem, const TableRow& row) {
    const Real* cos = static_cast<const Real*>(problem.cos.data) + row.cos_offset;
    const Real* sin = static_cast<const Real*>(problem.sin.data) + row.sin_offset;
    const Real sign = problem.conjugate ? Real(-1) : Real(1);
    const auto cos_a = load_pairs(cos, first_pair, problem.cos.stride_pair);
    const auto sin_a = load_pairs(sin, first_pair, problem.sin.stride_pair);
    if constexpr (kPairsInsideVector) {
      const auto cos_b = load_pairs(cos, second_pair, problem.cos.stride_pair);
      const auto sin_b = load_pairs(sin, second_pair, problem.sin.stride_pair);
#pragma unroll
      for (int i = 0; i < kPairsPerVector; ++i) {
        rotate_pair(a[2 * i], a[2 * i + 1], cos_a[i], sign * sin_a[i]);
        rotate_pair(b[2 * i], b[2 * i + 1], cos_b[i], sign * sin_b[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPairsPerVector; ++i) {
        rotate_pair(a[i], b[i], cos_a[i], sign * sin_a[i]);
      }
    }
  }

  __device__ void fill_nan() {
    const T nan = narrow<T>(static_cast<Real>(NAN));
#pragma unroll
    for (int i = 0; i < V; ++i) {
      a[i] = nan;
      b[i] = nan;
    }
  }

  __device__ void store(T* head, int64_t stride) const {
    store_channels(head, first, stride, a);
    if (has_second) {
      store_channels(head, second, stride, b);
    }
  }

  bool rotates, has_second;
  int first, second;
  int first_pair, second_pair;
  Vector<T, V> a, b;

 private:
  __device__ static Vector<T, V> load_channels(const T* head, int channel, int64_t stride) {
    if constexpr (V == 1) {
      return {head[channel * stride]};
    } else {
      if (stride != 0) {
        return cuda::load<V>(head + channel);
      }
      Vector<T, V> same;  // an expanded tensor, such as the gradient of sum()
#pragma unroll
      for (int i = 0; i < V; ++i) {
        same[i] = *head;
      }
      return same;
    }
  }

  __device__ static void store_channels(T* head, int channel, int64_t stride, const Vector<T, V>& vector) {
    if constexpr (V == 1) {
      head[channel * stride] = vector[0];
    } else {
      cuda::store<V>(head + channel, vector);
    }
  }

  __device__ static Vector<Real, kPairsPerVector> load_pairs(const Real* row, int pair, int64_t stride) {
    if constexpr (V == 1) {
      return {row[pair * stride]};
    } else {
      Vector<Real, kPairsPerVector> entries;
      constexpr int kStep = kTableVector<Real, kPairsPerVector>;
#pragma unroll
      for (int i = 0; i < kPairsPerVector; i += kStep) {
        const auto part = cuda::load<kStep>(row + pair + i);
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
          entries[i + j] = part[j];
        }
      }
      return entries;
    }
  }

  __device__ static void rotate_pair(T& x1, T& x2, Real cos, Real sin) {
    const Real wide1 = widen(x1);
    const Real wide2 = widen(x2);
    x1 = narrow<T>(wide1 * cos - wide2 * sin);
    x2 = narrow<T>(wide1 * sin + wide2 * cos);
  }
};

}  // namespace posenc::cuda
