#pragma once

#include <cuda/detail/score_grid.h>
#include <cuda/detail/reduce.cuh>
#include <cuda/detail/score_vectors.cuh>

#include <cuda_pipeline_primitives.h>

// Softmax of scaled scores with their bias and masks, and its gradient. Threads along x share a row and keep it: what
// is read once is not read again. Rows too long for that are read twice, by the *long* kernels.
//
// The end of a row's reduction waits for all of its loads, so an SM needs rows of other blocks in flight meanwhile:
// hence few registers, two blocks of the largest size at least.
namespace posenc::cuda {

constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowWarps = kMaxRowThreads / kWarp;

/// A tile is what one thread keeps of a row: `Count` vectors, a block's width apart.
template <int VectorWidth, int Count, bool IsCausal>
struct RowPolicy {
  static constexpr int kVectorWidth = VectorWidth;
  static constexpr int kCount = Count;
  static constexpr bool kCausal = IsCausal;
};

/// Blocks of the largest size that an SM must hold: where a thread keeps 32 registers of a row, two fit. Single
/// elements come with an address each, for which 64 registers are too few.
template <int VectorWidth, int Bytes>
constexpr int kMinRowBlocks = VectorWidth > 1 && Bytes <= 128 ? 2 : 1;

/// exp(x). Narrow results do not show that this one is only good to 5e-6, nor that it knows no subnormal numbers.
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

/// One row of a call, as seen by one thread.
template <typename T>
struct SoftmaxRow {
  using Real = arithmetic_t<T>;

  const T* in;
  const bool* hides;  // null where there is no mask
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

  /// The logits of V keys from `key` on, of which the query sees the first: minus infinity where it does not see one.
  /// Distances of a `Short` row, below 2^24 keys, are exact in float32 and so can be counted on: a conversion each
  /// costs as much as the exponential.
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

  /// Probabilities of V keys from `key` on from their exponentials; zero where causality hides the key, even in a row
  /// of NaN.
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

/// What to subtract from logits: a row that sees nothing has no maximum, and its exponentials must be 0, not NaN.
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
  // All threads meet at the reductions: those behind the last query repeat it, and do not store.
  const uint32_t query = own_query < q_len ? own_query : q_len - 1;
  const SoftmaxRow<T> row(problem, {batch, head}, query, Policy::kCausal);
  const uint32_t step = blockDim.x * V;
  const uint32_t first = threadIdx.x * V;

  // Vectors that causality hides, half of a square matrix, cost a comparison at each step and no arithmetic.
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

/// One row a block, of any length.
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

// --- Backward -------------------------------------------------------------------------------------------------------

/// Sums over the visible keys of a row, of one thread and then of all, and what follows from them. With P the saved
/// probabilities and r the sum of P g,
///
///     dscores = scale P (g - r),    row_sum = sum of P (g - r) (d - mean),    mean = sum of P d.
///
/// With `SlopesGrad`, P are the saved probabilities divided by their sum, and distances d are counted from their mean.
/// Saved probabilities of half and bfloat16 are rounded: their sum differs from 1 by up to 2^-8, which would multiply
/// the mean of g, and distances of thousands. Both leave the exact sum unchanged. Without, the rounding of P is that of
/// dscores themselves, and no sum but that of P g is taken: two more cost up to 11 % of the time of this pass, rows of
/// 2,048 to 16,384 on an H200.
template <typename T, bool SlopesGrad>
struct GradientRow {
  using Real = arithmetic_t<T>;
  enum Term { product, total, moment };
  static constexpr int kTerms = SlopesGrad ? 3 : 1;

  int32_t nearest;  // the key that distances are counted from
  uint32_t visible;
  Real sums[kTerms] = {};
  Real r, normaliser = 1, mean = 0;

  __device__ GradientRow(const AlibiSoftmaxBackwardProblem& problem, uint32_t query, bool causal) {
    const int32_t position = problem.shape.position(static_cast<int32_t>(query));
    nearest = problem.shape.nearest_key(position);
    visible = static_cast<uint32_t>(causal ? problem.shape.visible(position) : problem.shape.k_len);
  }

  /// The distance of key `key + i` from `nearest`: counted on, as a conversion costs more.
  __device__ Real distance_of(Real from, int i) const { return fabs(from + static_cast<Real>(i)); }
  __device__ Real first_distance(uint32_t key) const { return static_cast<Real>(static_cast<int32_t>(key) - nearest); }

  template <int V>
  __device__ void add(const Vector<T, V>& grads, const Vector<T, V>& probs, uint32_t key) {
    const Real from = first_distance(key);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (key + i < visible) {
        const Real p = widen(probs[i]);
        sums[product] = multiply_add(widen(grads[i]), p, sums[product]);
        if constexpr (SlopesGrad) {
          sums[total] += p;
          sums[moment] = multiply_add(p, distance_of(from, i), sums[moment]);
        }
      }
    }
  }

  /// Once for all threads of the row, between `add` and `gradient`.
  __device__ void reduce(Real* scratch) {
    sum_row(sums, scratch);
    r = sums[product];
    if constexpr (SlopesGrad) {
      normaliser = reciprocal_or_zero(sums[total]);
      r *= normaliser;
      mean = sums[moment] * normaliser;
    }
  }

  /// The gradient of the scores; returns what V keys add to `row_sum`, not yet divided by the sum of probabilities.
  template <int V>
  __device__ Real
  gradient(const Vector<T, V>& grads, const Vector<T, V>& probs, Real scale, uint32_t key, Vector<T, V>& result) const {
    const Real from = first_distance(key);
    const Real factor = scale * normaliser;
    Real part = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Real term = key + i < visible ? widen(probs[i]) * (widen(grads[i]) - r) : Real(0);
      if constexpr (SlopesGrad) {
        part = multiply_add(term, distance_of(from, i) - mean, part);
      }
      result[i] = narrow<T>(factor * term);
    }
    return part;
  }
};

/// With `Staged` the incoming gradients wait in shared memory, each thread's own, and only the probabilities in
/// registers: rows of 16,384 float32 keys would leave an SM room for one block otherwise.
template <typename T, typename Policy, bool Staged, bool SlopesGrad>
__global__ void __launch_bounds__(
    kMaxRowThreads,
    kMinRowBlocks<
        Policy::kVectorWidth,
        Policy::kVectorWidth * Policy::kCount* static_cast<int>(sizeof(T)) * (Staged ? 1 : 2)>)
    alibi_softmax_backward_kernel(
        const __grid_constant__ AlibiSoftmaxBackwardProblem problem,
        const __grid_constant__ Matrices matrices) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr int U = Policy::kCount;
  using Row = GradientRow<T, SlopesGrad>;
  __shared__ Real scratch[kMaxRowWarps * Row::kTerms];
  extern __shared__ uint4 stage_bytes[];
  const uint32_t matrix = Matrices::of_block();
  if (matrix >= matrices.count) {
    return;
  }
  const auto [batch, head] = matrices.index(matrix);
  const AlibiShape& shape = problem.shape;
  const uint32_t own_query = blockIdx.x * blockDim.y + threadIdx.y;
  const auto q_len = static_cast<uint32_t>(shape.q_len);
  const auto k_len = static_cast<uint32_t>(shape.k_len);
  const uint32_t query = own_query < q_len ? own_query : q_len - 1;
  Row row(problem, query, Policy::kCausal);
  const uint32_t visible = row.visible;
  const uint32_t step = blockDim.x * V;
  const uint32_t first = threadIdx.x * V;
  const T* grad = static_cast<const T*>(problem.grad.data) + problem.grad.strides.row(batch, head, query);
  const T* prob = static_cast<const T*>(problem.probs.data) + problem.probs.strides.row(batch, head, query);

  auto* const stage = reinterpret_cast<Vector<T, V>*>(stage_bytes) + threadIdx.y * blockDim.x + threadIdx.x;
  const uint32_t stage_step = blockDim.x * blockDim.y;
  Vector<T, V> grads[Staged ? 1 : U];
  Vector<T, V> probs[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const uint32_t key = first + u * step;
    probs[u] = Vector<T, V>{};
    if constexpr (!Staged) {
      grads[u] = Vector<T, V>{};
    }
    if (key < visible) {
      if constexpr (Staged) {
        __pipeline_memcpy_async(stage + u * stage_step, grad + key, sizeof(Vector<T, V>));
      } else {
        grads[u] = load_strided<V>(grad, key, problem.grad.strides.key);
      }
      probs[u] = load_strided<V>(prob, key, problem.probs.strides.key);
    }
  }
  if constexpr (Staged) {
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }
  const auto grads_of = [&](int u) {
    if constexpr (Staged) {
      return first + u * step < visible ? stage[u * stage_step] : Vector<T, V>{};
    } else {
      return grads[u];
    }
  };

#pragma unroll
  for (int u = 0; u < U; ++u) {
    row.add(grads_of(u), probs[u], first + u * step);
  }
  row.reduce(scratch);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    keep_packed(probs[u]);
    if constexpr (!Staged) {
      keep_packed(grads[u]);
    }
  }
  T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(batch, head, query);
  const Real scale = static_cast<Real>(problem.scale);
  const bool live = own_query < q_len;
  Real moment = 0;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const uint32_t key = first + u * step;
    if (key < k_len && live) {
      Vector<T, V> result;
      moment += row.gradient(grads_of(u), probs[u], scale, key, result);
      store_strided<V>(out, key, problem.out.strides.key, result);
    }
  }
  if constexpr (SlopesGrad) {
    __shared__ double moments[kMaxRowWarps];
    const double sum = reduce_row(static_cast<double>(moment), 0.0, Sum(), moments);
    if (threadIdx.x == 0 && live) {
      problem.row_sums[(head * shape.batch + batch) * q_len + query] = sum * static_cast<double>(row.normaliser);
    }
  }
}

/// One row a block, of any length.
template <typename T, int V, bool SlopesGrad>
__global__ void __launch_bounds__(kMaxRowThreads) alibi_softmax_backward_long_kernel(
    const __grid_constant__ AlibiSoftmaxBackwardProblem problem,
    const __grid_constant__ Matrices matrices) {
  using Real = arithmetic_t<T>;
  using Row = GradientRow<T, SlopesGrad>;
  __shared__ Real scratch[kMaxRowWarps * Row::kTerms];
  const uint32_t matrix = Matrices::of_block();
  if (matrix >= matrices.count) {
    return;
  }
  const auto [batch, head] = matrices.index(matrix);
  const AlibiShape& shape = problem.shape;
  const uint32_t query = blockIdx.x;
  Row row(problem, query, shape.causal);
  const uint32_t step = blockDim.x * V;
  const uint32_t first = threadIdx.x * V;
  const T* grad = static_cast<const T*>(problem.grad.data) + problem.grad.strides.row(batch, head, query);
  const T* prob = static_cast<const T*>(problem.probs.data) + problem.probs.strides.row(batch, head, query);
  for (uint32_t key = first; key < row.visible; key += step) {
    row.add(
        load_strided<V>(grad, key, problem.grad.strides.key), load_strided<V>(prob, key, problem.probs.strides.key),
        key);
  }
  row.reduce(scratch);
  T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(batch, head, query);
  double moment = 0;
  for (uint32_t key = first; key < static_cast<uint32_t>(shape.k_len); key += step) {
    Vector<T, V> grads{};
    Vector<T, V> probs{};
    if (key < row.visible) {
      grads = load_strided<V>(grad, key, problem.grad.strides.key);
      probs = load_strided<V>(prob, key, problem.probs.strides.key);
    }
    Vector<T, V> result;
    moment += static_cast<double>(row.gradient(grads, probs, static_cast<Real>(problem.scale), key, result));
    store_strided<V>(out, key, problem.out.strides.key, result);
  }
  if constexpr (SlopesGrad) {
    __shared__ double moments[kMaxRowWarps];
    moment = reduce_row(moment, 0.0, Sum(), moments);
    if (threadIdx.x == 0) {
      problem.row_sums[(head * shape.batch + batch) * shape.q_len + query] =
          moment * static_cast<double>(row.normaliser);
    }
  }
}

}  // namespace posenc::cuda
