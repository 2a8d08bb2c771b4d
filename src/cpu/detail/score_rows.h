#pragma once

#include <arguments/alibi_problem.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/lanes.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace posenc::cpu {

/// One query of one head, and its index in `[H, B, Sq]` or `[B, H, Sq]`.
struct ScoreRow {
  int64_t batch, head;
  int32_t query;
  int64_t index;
};

/// Calls `body` with every row of scores, in parallel, and `finish` at the end of the part of each thread. With
/// `head_first` rows are numbered as `[H, B, Sq]`.
template <typename Body, typename Finish>
void for_each_row(const AlibiShape& shape, bool head_first, const Body& body, const Finish& finish) {
  const int64_t rows = shape.batch * shape.num_heads * shape.q_len;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int32_t>(1, shape.k_len));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const int64_t inner = head_first ? shape.batch : shape.num_heads;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t matrix = index / shape.q_len;
      const auto query = static_cast<int32_t>(index % shape.q_len);
      const int64_t outer_index = matrix / inner;
      const int64_t inner_index = matrix % inner;
      body(
          head_first ? ScoreRow{inner_index, outer_index, query, index}
                     : ScoreRow{outer_index, inner_index, query, index});
    }
    finish();
  });
}

template <typename Body>
void for_each_row(const AlibiShape& shape, bool head_first, const Body& body) {
  for_each_row(shape, head_first, body, [] {});
}

/// Lanes of a sum or a maximum. GCC 12 keeps 32 lanes in vector registers, which hides the latency of additions. It
/// does not vectorise 16 lanes (more than three times as long, measured with float32 and bfloat16).
constexpr int kLanes = 32;

/// The sum of `value(j) * (distance(j) - mean)` over the first `count` keys. Eight terms of a lane are summed in
/// `Real`, with an error of about 10 units of roundoff of float32, and these sums in float64.
template <typename Real, typename Value>
POSENC_ALWAYS_INLINE double moment_of_row(int32_t position, int32_t count, const Value& value, Real mean = 0) {
  constexpr int32_t kBlock = 8 * kLanes;
  const auto term = [&](int32_t j) { return value(j) * (static_cast<Real>(AlibiShape::distance(position, j)) - mean); };
  Lanes<double, kLanes> sums(0);
  int32_t j = 0;
  while (j < count) {
    const int32_t end = std::min(count - j, kBlock) + j;
    Lanes<Real, kLanes> parts(0);
    for (; end - j >= kLanes; j += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        parts.values[lane] += term(j + lane);
      }
    }
    for (int lane = 0; j < end; ++j, ++lane) {
      parts.values[lane] += term(j);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      sums.values[lane] += static_cast<double>(parts.values[lane]);
    }
  }
  return sums.sum();
}

/// The gradient of slopes from the sums of `grad * distance` of all rows, `[H, B, Sq]`.
template <typename Real>
void sum_rows_of_heads(const AlibiShape& shape, const double* row_sums, Real* result) {
  const int64_t rows = shape.batch * shape.q_len;
  for (int64_t head = 0; head < shape.num_heads; ++head) {
    result[head] = static_cast<Real>(-std::accumulate(row_sums + head * rows, row_sums + (head + 1) * rows, 0.0));
  }
}

}  // namespace posenc::cpu
