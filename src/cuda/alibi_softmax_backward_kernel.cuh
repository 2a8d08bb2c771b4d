#pragma once

#include <cuda/alibi_softmax_kernel.cuh>

// The gradient of alibi_softmax. alibi_softmax_kernel.cuh describes rows and tiles.
namespace posenc::cuda {

/// Sums over the visible keys of a row, first of one thread and then of all, and the gradient that follows from them.
/// With P the saved probabilities, g the incoming gradient and r the sum of P g,
///
///     dscores = scale P (g - r),    row_sum = sum of P (g - r) (d - mean),    mean = sum of P d.
///
/// With `SlopesGrad`, P are the saved probabilities divided by their sum, and distances d are relative to their mean.
/// Saved probabilities in 16 bits are rounded: their sum differs from 1 by up to 2^-8, and this error would be
/// multiplied by the mean of g and by distances of thousands. Both changes leave the exact sum unchanged. Without
/// `SlopesGrad` the rounding of P is as large as that of dscores, and only the sum of P g is computed: the two other
/// sums cost up to 11 % of the time of this pass, rows of 2,048 to 16,384 on an H200.
template <typename T, bool SlopesGrad>
struct GradientRow {
  using Real = arithmetic_t<T>;
  enum Term { product, total, moment };
  static constexpr int kTerms = SlopesGrad ? 3 : 1;

  int32_t nearest;  // the key that distances are relative to
  uint32_t visible;
  Real sums[kTerms] = {};
  Real r, normaliser = 1, mean = 0;

  __device__ GradientRow(const AlibiSoftmaxBackwardProblem& problem, uint32_t query, bool causal) {
    const int32_t position = problem.shape.position(static_cast<int32_t>(query));
    nearest = problem.shape.nearest_key(position);
    visible = static_cast<uint32_t>(causal ? problem.shape.visible(position) : problem.shape.k_len);
  }

  /// The distance of key `key + i` relative to `nearest`. It is incremented, because a conversion costs more.
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

  /// Sums over all threads of the row. To be called once, between `add` and `gradient`.
  __device__ void reduce(Real* scratch) {
    sum_row(sums, scratch);
    r = sums[product];
    if constexpr (SlopesGrad) {
      normaliser = reciprocal_or_zero(sums[total]);
      r *= normaliser;
      mean = sums[moment] * normaliser;
    }
  }

  /// Computes the gradient of V scores. Returns their part of `row_sum`, not yet divided by the sum of probabilities.
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

/// With `Staged` each thread keeps its incoming gradients in shared memory and only the probabilities in registers.
/// Otherwise an SM would hold a single block for rows of 16,384 float32 keys.
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

/// One row of any length for each block.
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
