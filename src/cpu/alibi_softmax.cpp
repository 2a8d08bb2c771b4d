#include <arguments/alibi.h>
#include <cpu/detail/attention_tiles.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/score_rows.h>
#include <ops/dispatch.h>

#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

namespace posenc {
namespace {

using cpu::kLanes;

/// Writes the logits of the first `count` keys to `logits`. With `Dense` the stride is 1.
template <typename T, bool Dense>
POSENC_CPU_CLONES void logits_row(
    const T* in,
    int64_t stride,
    cpu::arithmetic_t<T> scale,
    cpu::arithmetic_t<T> slope,
    int32_t position,
    int32_t count,
    cpu::arithmetic_t<T>* __restrict logits) {
  using Real = cpu::arithmetic_t<T>;
  const int64_t step = Dense ? 1 : stride;
  for (int32_t j = 0; j < count; ++j) {
    const Real bias = -slope * static_cast<Real>(AlibiShape::distance(position, j));
    logits[j] = scale * static_cast<Real>(in[j * step]) + bias;
  }
}

template <typename Real>
POSENC_CPU_CLONES Real maximum(const Real* logits, int32_t count) {
  cpu::Lanes<Real, kLanes> lanes(-std::numeric_limits<Real>::infinity());
  int32_t j = 0;
  for (; count - j >= kLanes; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes.values[lane] = logits[j + lane] > lanes.values[lane] ? logits[j + lane] : lanes.values[lane];
    }
  }
  for (int lane = 0; j < count; ++j, ++lane) {
    lanes.values[lane] = logits[j] > lanes.values[lane] ? logits[j] : lanes.values[lane];
  }
  return *std::max_element(lanes.values, lanes.values + kLanes);
}

/// Replaces logits with `exp(logit - shift)` and returns the sum.
float exponentials(float* logits, float shift, int32_t count) {
  return cpu::tile_kernels<float>().exponentials(logits, shift, count);
}

double exponentials(double* logits, double shift, int32_t count) {
  double sum = 0;
  for (int32_t j = 0; j < count; ++j) {
    logits[j] = std::exp(logits[j] - shift);
    sum += logits[j];
  }
  return sum;
}

template <typename T, bool Dense>
POSENC_CPU_CLONES void scaled_row(
    const cpu::arithmetic_t<T>* exponentials,
    cpu::arithmetic_t<T> factor,
    int32_t count,
    T* __restrict out,
    int64_t stride) {
  const int64_t step = Dense ? 1 : stride;
  for (int32_t j = 0; j < count; ++j) {
    out[j * step] = static_cast<T>(exponentials[j] * factor);
  }
}

template <typename T>
void fill_zero(T* out, int64_t stride, int32_t begin, int32_t end) {
  for (int32_t j = begin; j < end; ++j) {
    out[j * stride] = static_cast<T>(0.0F);
  }
}

template <typename T>
void run_typed(const AlibiSoftmaxProblem& problem) {
  using Real = cpu::arithmetic_t<T>;
  constexpr Real kHidden = -std::numeric_limits<Real>::infinity();
  const AlibiShape& shape = problem.shape;
  const int64_t in_stride = problem.in.strides.key;
  const int64_t out_stride = problem.out.strides.key;
  const PaddingView& padding = problem.padding;
  const auto logits_of = in_stride == 1 ? logits_row<T, true> : logits_row<T, false>;
  const auto scaled = out_stride == 1 ? scaled_row<T, true> : scaled_row<T, false>;
  cpu::for_each_row(shape, /*head_first=*/false, [&](const cpu::ScoreRow& row) {
    static thread_local std::vector<Real> buffer;
    buffer.resize(shape.k_len);
    Real* logits = buffer.data();
    const T* in = static_cast<const T*>(problem.in.data) + problem.in.strides.row(row.batch, row.head, row.query);
    T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(row.batch, row.head, row.query);
    const int32_t position = shape.position(row.query);
    const int32_t visible = shape.visible(position);
    const Real slope = problem.slopes.slope<Real>(row.head);
    logits_of(in, in_stride, static_cast<Real>(problem.scale), slope, shape.nearest_key(position), visible, logits);
    if (padding.data != nullptr) {
      const bool* hides = padding.data + row.batch * padding.stride_batch;
      for (int32_t j = 0; j < visible; ++j) {
        logits[j] = hides[j * padding.stride_key] ? kHidden : logits[j];
      }
    }
    const Real top = maximum(logits, visible);
    const Real sum = exponentials(logits, top == kHidden ? Real(0) : top, visible);
    scaled(logits, sum == 0 ? Real(0) : 1 / sum, visible, out, out_stride);
    fill_zero(out, out_stride, visible, shape.k_len);
  });
}

/// One row of a backward pass. With `Dense` all strides are 1.
template <typename T>
struct BackwardRow {
  const T* grad;
  const T* probs;
  T* out;
  int64_t grad_stride, probs_stride, out_stride;
  int32_t nearest, count;  // the key that distances are relative to, and the number of visible keys
};

/// Writes the gradient of the scores of one row, `scale * P * (grad - r)`, with `P` the saved probabilities and `r` the
/// sum of `P * grad`. With `SlopesGrad` it returns the sum of `P * (grad - r) * distance`.
///
/// With `SlopesGrad`, `P` are the saved probabilities divided by their sum, and distances are relative to their mean
/// under `P`. Saved probabilities in 16 bits are rounded: their sum differs from 1 by up to 2^-8, and this error would
/// be multiplied by the mean of `grad` and by distances of thousands. Both changes leave the exact sum unchanged.
template <typename T, bool Dense, bool SlopesGrad>
POSENC_CPU_CLONES double backward_row(const BackwardRow<T>& row, double scale) {
  using Real = cpu::arithmetic_t<T>;
  const T* grad = row.grad;
  const T* probs = row.probs;
  T* __restrict out = row.out;
  const int64_t grad_step = Dense ? 1 : row.grad_stride;
  const int64_t probs_step = Dense ? 1 : row.probs_stride;
  const int64_t out_step = Dense ? 1 : row.out_stride;
  const int32_t nearest = row.nearest;
  const int32_t count = row.count;
  const auto g = [&](int32_t j) { return static_cast<Real>(grad[j * grad_step]); };
  const auto p = [&](int32_t j) { return static_cast<Real>(probs[j * probs_step]); };

  cpu::Lanes<Real, kLanes> products(0);
  [[maybe_unused]] cpu::Lanes<Real, kLanes> totals(0);
  [[maybe_unused]] cpu::Lanes<Real, kLanes> moments(0);
  [[maybe_unused]] const auto moment = [&](int32_t key) {
    return p(key) * static_cast<Real>(AlibiShape::distance(nearest, key));
  };
  int32_t j = 0;
  for (; count - j >= kLanes; j += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      products.values[lane] += g(j + lane) * p(j + lane);
      if constexpr (SlopesGrad) {
        totals.values[lane] += p(j + lane);
        moments.values[lane] += moment(j + lane);
      }
    }
  }
  for (int lane = 0; j < count; ++j, ++lane) {
    products.values[lane] += g(j) * p(j);
    if constexpr (SlopesGrad) {
      totals.values[lane] += p(j);
      moments.values[lane] += moment(j);
    }
  }
  Real normaliser = 1;
  if constexpr (SlopesGrad) {
    const Real total = totals.sum();
    normaliser = total == 0 ? Real(0) : 1 / total;
  }
  const Real r = products.sum() * normaliser;
  const Real factor = static_cast<Real>(scale) * normaliser;
  for (j = 0; j < count; ++j) {
    out[j * out_step] = static_cast<T>(factor * (p(j) * (g(j) - r)));
  }
  if constexpr (SlopesGrad) {
    const Real mean = moments.sum() * normaliser;
    const auto term = [&](int32_t key) { return p(key) * (g(key) - r); };
    return cpu::moment_of_row<Real>(nearest, count, term, mean) * static_cast<double>(normaliser);
  } else {
    return 0;
  }
}

template <typename T>
void run_backward_typed(const AlibiSoftmaxBackwardProblem& problem) {
  const AlibiShape& shape = problem.shape;
  const auto at_row = [](const ScoreStrides& strides, const cpu::ScoreRow& row) {
    return strides.row(row.batch, row.head, row.query);
  };
  const int64_t strides[] = {problem.grad.strides.key, problem.probs.strides.key, problem.out.strides.key};
  const bool dense = strides[0] == 1 && strides[1] == 1 && strides[2] == 1;
  const bool slopes_grad = problem.row_sums != nullptr;
  const auto backward = slopes_grad ? (dense ? backward_row<T, true, true> : backward_row<T, false, true>)
                                    : (dense ? backward_row<T, true, false> : backward_row<T, false, false>);
  cpu::for_each_row(shape, /*head_first=*/true, [&](const cpu::ScoreRow& at) {
    const int32_t position = shape.position(at.query);
    const BackwardRow<T> row{
        static_cast<const T*>(problem.grad.data) + at_row(problem.grad.strides, at),
        static_cast<const T*>(problem.probs.data) + at_row(problem.probs.strides, at),
        static_cast<T*>(problem.out.data) + at_row(problem.out.strides, at),
        strides[0],
        strides[1],
        strides[2],
        shape.nearest_key(position),
        shape.visible(position)};
    const double sum = backward(row, problem.scale);
    if (slopes_grad) {
      problem.row_sums[at.index] = sum;
    }
    fill_zero(row.out, row.out_stride, row.count, shape.k_len);
  });
  if (problem.slopes != nullptr) {
    cpu::sum_rows_of_heads(shape, problem.row_sums, static_cast<cpu::arithmetic_t<T>*>(problem.slopes));
  }
}

void run(const AlibiSoftmaxProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run_typed<typename decltype(type)::type>(problem); });
}

void run_backward(const AlibiSoftmaxBackwardProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run_backward_typed<typename decltype(type)::type>(problem); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_softmax", kernel<arguments::alibi_softmax<run>>);
  m.impl("alibi_softmax_backward", kernel<arguments::alibi_softmax_backward<run_backward>>);
}

}  // namespace posenc
