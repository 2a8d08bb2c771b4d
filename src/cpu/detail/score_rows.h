#pragma once

#include <contract/alibi_problem.h>
#include <cpu/detail/lanes.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace posenc::cpu {

/// One query of one head, and its number in the order `[H, B, Sq]` or `[B, H, Sq]`.
struct ScoreRow {
  int64_t batch, head;
  int32_t query;
  int64_t index;
};

/// Calls `body` with every row of scores, spread over threads. With `head_first` rows are numbered as `[H, B, Sq]`.
template <typename Body>
void for_each_row(const AlibiShape& shape, bool head_first, const Body& body) {
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
  });
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
