#pragma once

#include <cuda/detail/attention_tile.cuh>
#include <cuda/detail/reduce.cuh>
#include <cuda/detail/vector.cuh>

#include <cmath>

// Softmax and its derivative for blocks of rows of scores in memory, the elementwise part of attention in float32 and
// float64. A thread block computes one row, unless a kernel says otherwise. No torch.
namespace posenc::cuda {

constexpr int kAttentionRowThreads = 128;

/// Columns of a thread whose logits stay in registers between the two passes of the softmax. A row of up to 2,048
/// visible keys is read once.
constexpr int kRegisterColumns = 16;

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}
__device__ inline float hyperbolic_tangent(float x) {
  return tanhf(x);
}
__device__ inline double hyperbolic_tangent(double x) {
  return tanh(x);
}

/// A logit, and its derivative by the scaled score.
template <typename Real>
struct Logit {
  Real value, derivative;
};

/// A row of a block of scores, and the columns that its query sees.
template <typename Real>
struct ScoreRow {
  int query, head, position;
  int begin, end;  // visible columns, 0 <= begin <= end <= keys
  bool valid;      // whether the lengths of the sequence are valid
  Real scale, slope;
  Real softcap;   // 0: none
  int64_t first;  // index of column 0 in scores
  int64_t index;  // index of the row in lse
  int first_key;

  __device__ ScoreRow(const AttentionRowsProblem& p, const Positions& positions, const Sequence& sequence, int row) {
    head = static_cast<int>(blockIdx.y);
    query = p.first_row + row;
    position = positions.of(query);
    valid = sequence.valid;
    const bool alive = valid && query < sequence.q_len;
    begin = alive ? min(p.keys, max(0, positions.first_key(position) - p.first_key)) : 0;
    end = alive ? max(begin, min(p.keys, positions.end_key(position) - p.first_key)) : 0;
    scale = static_cast<Real>(p.scale);
    softcap = static_cast<Real>(p.softcap);
    slope = slope_of<Real>(p, sequence, head);
    const int64_t of_head = static_cast<int64_t>(sequence.index) * p.q_heads + head;
    first = (of_head * p.rows + row) * p.keys;
    index = of_head * p.q_len + query;
    first_key = p.first_key;
  }
  __device__ Real distance(int column) const { return static_cast<Real>(abs(position - first_key - column)); }
  __device__ Logit<Real> logit(Real score, int column) const {
    const Real scaled = score * scale;
    const Real bias = slope * distance(column);
    if (softcap == 0) {
      return {scaled - bias, 1};
    }
    const Real tangent = hyperbolic_tangent(scaled / softcap);
    return {softcap * tangent - bias, 1 - tangent * tangent};
  }
};

/// The maximum of some numbers, and the sum of their exponentials relative to it.
template <typename Real>
struct MaxAndSum {
  Real max = -INFINITY;
  Real sum = 0;

  __device__ void add(Real x) {
    if (x > max) {
      sum *= exponential(max - x);
      max = x;
    }
    sum += x == -INFINITY ? Real(0) : exponential(x - max);
  }
};

/// Replaces scores by probabilities and writes the log-sum-exp of the row.
template <typename Real>
__global__ void __launch_bounds__(kAttentionRowThreads)
    attention_softmax_rows_kernel(const __grid_constant__ AttentionRowsProblem problem) {
  __shared__ Real scratch[kWarp];
  const Sequence sequence = padded_sequence(problem, static_cast<int>(blockIdx.z));
  const ScoreRow<Real> row(problem, Positions(problem, sequence), sequence, static_cast<int>(blockIdx.x));
  Real* const scores = static_cast<Real*>(problem.scores) + row.first;
  const int thread = static_cast<int>(threadIdx.x);
  const auto column_of = [&](int i) { return row.begin + thread + i * kAttentionRowThreads; };
  Real max = -INFINITY;
  Real sum = 0;
  Real shift = 0;
  if (row.end - row.begin <= kRegisterColumns * kAttentionRowThreads) {
    Real values[kRegisterColumns];  // logits, then their exponentials
#pragma unroll
    for (int i = 0; i < kRegisterColumns; ++i) {
      if (const int column = column_of(i); column < row.end) {
        values[i] = row.logit(scores[column], column).value;
        max = values[i] > max ? values[i] : max;
      }
    }
    max = reduce_row(max, static_cast<Real>(-INFINITY), Maximum(), scratch);
    shift = max == -INFINITY ? Real(0) : max;
#pragma unroll
    for (int i = 0; i < kRegisterColumns; ++i) {
      if (column_of(i) < row.end) {
        values[i] = exponential(values[i] - shift);
        sum += values[i];
      }
    }
    __syncthreads();
    sum = reduce_row(sum, Real(0), Sum(), scratch);
    const Real scale = sum == 0 ? Real(0) : 1 / sum;
#pragma unroll
    for (int i = 0; i < kRegisterColumns; ++i) {
      if (const int column = column_of(i); column < row.end) {
        scores[column] = values[i] * scale;
      }
    }
  } else {
    MaxAndSum<Real> of_thread;
    for (int column = column_of(0); column < row.end; column += kAttentionRowThreads) {
      of_thread.add(row.logit(scores[column], column).value);
    }
    max = reduce_row(of_thread.max, static_cast<Real>(-INFINITY), Maximum(), scratch);
    shift = max == -INFINITY ? Real(0) : max;
    __syncthreads();
    sum = reduce_row(of_thread.sum * exponential(of_thread.max - shift), Real(0), Sum(), scratch);
    const Real minus = sum == 0 ? Real(0) : shift + ::log(sum);
    for (int column = column_of(0); column < row.end; column += kAttentionRowThreads) {
      scores[column] = exponential(row.logit(scores[column], column).value - minus);
    }
  }
  const Real lse = !row.valid ? static_cast<Real>(NAN) : sum == 0 ? static_cast<Real>(-INFINITY) : shift + ::log(sum);
  const Real hidden = row.valid ? Real(0) : lse;
  for (int column = thread; column < row.begin; column += kAttentionRowThreads) {
    scores[column] = hidden;
  }
  for (int column = row.end + thread; column < problem.keys; column += kAttentionRowThreads) {
    scores[column] = hidden;
  }
  if (thread == 0) {
    static_cast<Real*>(problem.lse)[row.index] = lse;
  }
}

/// Replaces the scores of a row by probabilities P, and the products dP of the gradient of the output and the values by
/// the gradient of the scaled scores, P (dP - delta) times the derivative of the softcap. With `kRowSums` it also
/// writes the sums of P, P d, P dP and P dP d over the keys of the row, d being the distance.
template <typename Real, bool kRowSums>
__global__ void __launch_bounds__(kAttentionRowThreads)
    attention_gradient_rows_kernel(const __grid_constant__ AttentionRowsProblem problem) {
  __shared__ double scratch[4 * kWarp];
  const Sequence sequence = padded_sequence(problem, static_cast<int>(blockIdx.z));
  const ScoreRow<Real> row(problem, Positions(problem, sequence), sequence, static_cast<int>(blockIdx.x));
  Real* const scores = static_cast<Real*>(problem.scores) + row.first;
  Real* const gradients = static_cast<Real*>(problem.gradients) + row.first;
  const Real lse = static_cast<const Real*>(problem.lse)[row.index];
  const Real delta = problem.delta == nullptr ? Real(0) : static_cast<const Real*>(problem.delta)[row.index];
  const Real invalid = static_cast<Real>(NAN);
  double sums[4] = {};
  for (int column = static_cast<int>(threadIdx.x); column < problem.keys; column += kAttentionRowThreads) {
    Real p = 0;
    Real ds = 0;
    if (column >= row.begin && column < row.end && lse != -INFINITY) {
      const Real dp = gradients[column];
      const Logit<Real> logit = row.logit(scores[column], column);
      p = exponential(logit.value - lse);
      ds = p * (dp - delta) * logit.derivative;
      if constexpr (kRowSums) {
        const Real distance = row.distance(column);
        const double product = static_cast<double>(p) * dp;
        sums[0] += p;
        sums[1] += static_cast<double>(p) * distance;
        sums[2] += product;
        sums[3] += product * distance;
      }
    }
    scores[column] = row.valid ? p : invalid;
    gradients[column] = row.valid ? ds : invalid;
  }
  if constexpr (kRowSums) {
    sum_row(sums, scratch);
    if (threadIdx.x == 0) {
      const int64_t all = static_cast<int64_t>(problem.batch) * problem.q_heads * problem.q_len;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        problem.row_sums[i * all + row.index] = row.valid ? sums[i] : NAN;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Infinite values. Those that a row does not see must not reach it as 0 * NaN: products with probabilities read finite
// values, and the others are added to the rows that see them.

/// Sets `infinite` of the heads whose values are not all finite. `infinite` is zero at first.
template <typename Real>
__global__ void __launch_bounds__(kAttentionRowThreads)
    attention_find_infinities_kernel(const __grid_constant__ AttentionRowsProblem problem) {
  const int64_t of_head = static_cast<int64_t>(problem.k_len) * problem.head_dim;
  const Real* const values = static_cast<const Real*>(problem.values) + blockIdx.y * of_head;
  bool found = false;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kAttentionRowThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kAttentionRowThreads + threadIdx.x; i < of_head; i += step) {
    found |= !isfinite(values[i]);
  }
  if (found) {
    problem.infinite[blockIdx.y] = 1;
  }
}

/// Adds the values that are infinite or NaN to the rows of `out` that see them. A thread block computes every
/// gridDim.x-th row.
template <typename Real>
__global__ void __launch_bounds__(kAttentionRowThreads)
    attention_add_infinities_kernel(const __grid_constant__ AttentionRowsProblem problem) {
  const int64_t batch = blockIdx.z;
  const int64_t key_head = batch * (problem.q_heads / problem.group) + blockIdx.y / problem.group;
  if (problem.infinite[key_head] == 0) {
    return;
  }
  const Sequence sequence = padded_sequence(problem, static_cast<int>(batch));
  const Real* const values =
      static_cast<const Real*>(problem.values) + (key_head * problem.k_len + problem.first_key) * problem.head_dim;
  for (int index = static_cast<int>(blockIdx.x); index < problem.rows; index += static_cast<int>(gridDim.x)) {
    const ScoreRow<Real> row(problem, Positions(problem, sequence), sequence, index);
    Real* const out = static_cast<Real*>(problem.out) + row.first / problem.keys * problem.head_dim;
    for (int channel = static_cast<int>(threadIdx.x); channel < problem.head_dim; channel += kAttentionRowThreads) {
      Real sum = 0;
      for (int64_t column = row.begin; column < row.end; ++column) {
        const Real value = values[column * problem.head_dim + channel];
        sum += isfinite(value) ? Real(0) : value;
      }
      out[channel] += sum;
    }
  }
}

}  // namespace posenc::cuda
