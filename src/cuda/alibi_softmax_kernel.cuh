#pragma once

#include <cuda/detail/score_grid.h>
#include <cuda/detail/reduce.cuh>
#include <cuda/detail/score_vectors.cuh>

#include <cuda_pipeline_primitives.h>

// Softmax of scaled scores with bias and masks, and its gradient. Threads along x share a row and keep it in registers,
// so that it is read once. Rows that do not fit are read twice, by the *long* kernels.
//
// The reduction of a row waits for all of its loads. Other blocks must have loads in flight meanwhile, so registers are
// limited such that an SM holds at least two blocks of the largest size.
namespace posenc::cuda {

constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowWarps = kMaxRowThreads / kWarp;

/// The part of a row that one thread keeps: `Count` vectors, a block's width apart.
template <int VectorWidth, int Count, bool IsCausal>
struct RowPolicy {
  static constexpr int kVectorWidth = VectorWidth;
  static constexpr int kCount = Count;
  static constexpr bool kCausal = IsCausal;
};

/// Blocks of the largest size that an SM holds at least. Two fit if a thread keeps 32 registers of a row. Single
/// elements need an address each, for which 64 registers are too few.
template <int VectorWidth, int Bytes>
constexpr int kMinRowBlocks = VectorWidth > 1 && Bytes <= 128 ? 2 : 1;

/// exp(x) with a relative error of 5e-6 and without subnormal numbers, which results in 16 bits do not show.
template <typename T>
__device__ arithmetic_t<T> exponential(arithmetic_t<T> x) {
  if constexpr (sizeof(T) == 2) {
    constexpr float kLog2E = 1.44269504F;
    return approximate_exp2(x * kLog2E);
  } else if constexpr (sizeof(T) == 4) {
    return expf(x);
  } else {
    return exp(x);
  }
}

/// The state of one row in one thread.
template <typename T>
struct SoftmaxRow {
  using Real = arithmetic_t<T>;

  const T* in;
  const bool* hides;  // key padding mask of the batch, or null
  int64_t in_stride, hides_stride;
  Real scale, slope;
  int32_t nearest;
  uint32_t visible;

  __device__ SoftmaxRow(
      const AlibiSoftmaxProblem& problem,
      const Matrices::Index& matrix,
      uint32_t query,
      bool causal) {
    const AlibiShape& shape = problem.shape;
    const PaddingView& padding = problem.padding;
    in = static_cast<const T*>(problem.in.data) + problem.in.strides.row(matrix.batch, matrix.head, query);
    in_stride = problem.in.strides.key;
    hides = padding.data == nullptr ? nullptr : padding.data + matrix.batch * padding.stride_batch;
    hides_stride = padding.stride_key;
    scale = static_cast<Real>(problem.scale);
    slope = problem.slopes.slope<Real>(matrix.head);
    const int32_t position = shape.position(static_cast<int32_t>(query));
    nearest = shape.nearest_key(position);
    visible = static_cast<uint32_t>(causal ? shape.visible(position) : shape.k_len);
  }

  /// The logits of V keys from `key` on; the query sees the first of them. Minus infinity where it does not see a key.
  /// A `Short` row has less than 2^24 keys, so its distances are exact in float32 and can be incremented. Converting
  /// each of them would cost as much as the exponential.
  template <bool Short, int V>
  __device__ Vector<Real, V> logits(const Vector<T, V>& scores, uint32_t key) const {
    Vector<Real, V> result = widen(scores);
    const auto from = static_cast<Real>(static_cast<int32_t>(key) - nearest);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Real offset =
          Short ? from + static_cast<Real>(i) : static_cast<Real>(static_cast<int32_t>(key) - nearest + i);
      const Real bias = multiply(-slope, fabs(offset));
      result[i] = sizeof(T) == 2 ? multiply_add(result[i], scale, bias) : multiply(result[i], scale) + bias;
    }
    if (key + V > visible || hides != nullptr) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (key + i >= visible || (hides != nullptr && hides[(key + i) * hides_stride])) {
          result[i] = static_cast<Real>(-INFINITY);
        }
      }
    }
    return result;
  }

  /// The probabilities of V keys from `key` on from their exponentials; zero where the causal mask hides the key, even
  /// if the row is NaN.
  template <int V>
  __device__ Vector<T, V> probabilities(Vector<Real, V> exponentials, Real factor, uint32_t key) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      exponentials[i] *= factor;
    }
    if (key + V > visible) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        exponentials[i] = key + i < visible ? exponentials[i] : Real(0);
      }
    }
    return narrow<T>(exponentials);
  }
};

/// The number to subtract from logits. The maximum of a row that sees no key is minus infinity; 0 is subtracted then,
/// so that its exponentials are 0 and not NaN.
template <typename Real>
__device__ Real shift_of(Real maximum) {
  return maximum == static_cast<Real>(-INFINITY) ? Real(0) : maximum;
}

template <typename Real>
__device__ Real reciprocal_or_zero(Real sum) {
  return sum == Real(0) ? Real(0) : Real(1) / sum;
}

template <typename T, typename Policy>
__global__ void __launch_bounds__(
    kMaxRowThreads,
    kMinRowBlocks<
        Policy::kVectorWidth,
        Policy::kVectorWidth * Policy::kCount* static_cast<int>(sizeof(arithmetic_t<T>))>)
    alibi_softmax_kernel(
        const __grid_constant__ AlibiSoftmaxProblem problem,
        const __grid_constant__ Matrices matrices) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr int U = Policy::kCount;
  __shared__ Real scratch[2][kMaxRowWarps];
  const uint32_t matrix = Matrices::of_block();
  if (matrix >= matrices.count) {
    return;
  }
  const auto [batch, head] = matrices.index(matrix);
  const uint32_t own_query = blockIdx.x * blockDim.y + threadIdx.y;
  const auto q_len = static_cast<uint32_t>(problem.shape.q_len);
  const auto k_len = static_cast<uint32_t>(problem.shape.k_len);
  // All threads take part in the reductions. Threads behind the last query compute it again and do not store.
  const uint32_t query = own_query < q_len ? own_query : q_len - 1;
  const SoftmaxRow<T> row(problem, {batch, head}, query, Policy::kCausal);
  const uint32_t step = blockDim.x * V;
  const uint32_t first = threadIdx.x * V;

  // Vectors that the causal mask hides, half of a square matrix, cost one comparison and no arithmetic.
  Vector<T, V> scores[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (first + u * step < row.visible) {
      scores[u] = load_strided<V>(row.in, first + u * step, row.in_stride);
    }
  }
  Vector<Real, V> values[U];
  auto top = static_cast<Real>(-INFINITY);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (first + u * step < row.visible) {
      values[u] = row.template logits<true>(scores[u], first + u * step);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        top = Maximum()(top, values[u][i]);
      }
    }
  }
  const Real shift = shift_of(reduce_row(top, static_cast<Real>(-INFINITY), Maximum(), scratch[0]));
  Real sum = 0;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (first + u * step < row.visible) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        values[u][i] = exponential<T>(values[u][i] - shift);
        sum += values[u][i];
      }
    }
  }
  const Real factor = reciprocal_or_zero(reduce_row(sum, Real(0), Sum(), scratch[1]));
  if (own_query >= q_len) {
    return;
  }
  T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(batch, head, query);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const uint32_t key = first + u * step;
    if (key < row.visible) {
      store_strided<V>(out, key, problem.out.strides.key, row.probabilities(values[u], factor, key));
    } else if (key < k_len) {
      store_strided<V>(out, key, problem.out.strides.key, Vector<T, V>{});
    }
  }
}

/// One row of any length for each block.
template <typename T, int V>
__global__ void __launch_bounds__(kMaxRowThreads) alibi_softmax_long_kernel(
    const __grid_constant__ AlibiSoftmaxProblem problem,
    const __grid_constant__ Matrices matrices) {
  using Real = arithmetic_t<T>;
  __shared__ Real scratch[2][kMaxRowWarps];
  const uint32_t matrix = Matrices::of_block();
  if (matrix >= matrices.count) {
    return;
  }
  const auto [batch, head] = matrices.index(matrix);
  const SoftmaxRow<T> row(problem, {batch, head}, blockIdx.x, problem.shape.causal);
  const uint32_t step = blockDim.x * V;
  const uint32_t first = threadIdx.x * V;

  // The sum of exponentials relative to the largest logit so far (Milakov and Gimelshein 2018, algorithm 3).
  auto top = static_cast<Real>(-INFINITY);
  Real sum = 0;
  for (uint32_t key = first; key < row.visible; key += step) {
    const auto logits = row.template logits<false>(load_strided<V>(row.in, key, row.in_stride), key);
    Real next = top;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      next = Maximum()(next, logits[i]);
    }
    const Real shift = shift_of(next);
    sum *= exponential<T>(top - shift);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum += exponential<T>(logits[i] - shift);
    }
    top = next;
  }
  const Real shift = shift_of(reduce_row(top, static_cast<Real>(-INFINITY), Maximum(), scratch[0]));
  sum *= exponential<T>(top - shift);
  const Real factor = reciprocal_or_zero(reduce_row(sum, Real(0), Sum(), scratch[1]));

  T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(batch, head, blockIdx.x);
  for (uint32_t key = first; key < static_cast<uint32_t>(problem.shape.k_len); key += step) {
    Vector<T, V> result{};
    if (key < row.visible) {
      auto values = row.template logits<false>(load_strided<V>(row.in, key, row.in_stride), key);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        values[i] = exponential<T>(values[i] - shift);
      }
      result = row.probabilities(values, factor, key);
    }
    store_strided<V>(out, key, problem.out.strides.key, result);
  }
}

}  // namespace posenc::cuda
