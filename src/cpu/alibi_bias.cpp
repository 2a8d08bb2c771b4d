#include <arguments/alibi.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/lanes.h>
#include <ops/dispatch.h>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

namespace posenc {
namespace {

/// Writes `count` entries of a row, of which the query sees the first `seen`: key 0 is `position` before the query.
template <typename T>
POSENC_CPU_CLONES void bias_row(T* out, cpu::arithmetic_t<T> slope, int32_t position, int32_t seen, int32_t count) {
  using Real = cpu::arithmetic_t<T>;
  POSENC_INDEPENDENT
  for (int32_t j = 0; j < seen; ++j) {
    out[j] = static_cast<T>(-slope * static_cast<Real>(AlibiShape::distance(position, j)));
  }
  for (int32_t j = seen; j < count; ++j) {
    out[j] = -std::numeric_limits<T>::infinity();
  }
}

/// `bias_row` in float32 or float64, for distances that are exact in `Real`. They are counted in `Real`, because
/// converting them takes as long as storing the results: 0.8 to 1.0 of the speed of a fill instead of 0.6 to 0.8,
/// measured with 8 heads of 256 and 512 tokens on one core. The hidden keys begin at a whole block, so that their
/// stores are aligned.
template <typename Real>
POSENC_CPU_CLONES void exact_bias_row(Real* __restrict out, Real slope, int32_t position, int32_t seen, int32_t count) {
  constexpr int32_t kLanes = 32;  // as in score_rows.h
  constexpr Real kHidden = -std::numeric_limits<Real>::infinity();
  Real offsets[kLanes];  // of the keys from the query
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    offsets[lane] = static_cast<Real>(lane - position);
  }
  int32_t j = 0;
  for (; seen - j >= kLanes; j += kLanes) {
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      out[j + lane] = -slope * std::abs(offsets[lane]);
    }
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      offsets[lane] += Real(kLanes);
    }
  }
  if (j < seen && count - j >= kLanes) {
    const auto last = static_cast<Real>(seen - 1 - position);
    for (int32_t lane = 0; lane < kLanes; ++lane) {
      out[j + lane] = offsets[lane] <= last ? -slope * std::abs(offsets[lane]) : kHidden;
    }
    j += kLanes;
  }
  for (; j < seen; ++j) {
    out[j] = -slope * static_cast<Real>(AlibiShape::distance(position, j));
  }
  for (; j < count; ++j) {
    out[j] = kHidden;
  }
}

/// Writes `count` entries of a row of the bias: key 0 is `position` before the query.
template <typename T>
void write_row(const AlibiAddProblem& problem, int64_t head, int64_t position, int64_t count, T* out) {
  const int64_t seen = problem.shape.causal ? std::clamp<int64_t>(position + 1, 0, count) : count;
  const auto slope = problem.slopes.slope<cpu::arithmetic_t<T>>(head);
  const auto row = [&](auto write) {
    write(out, slope, static_cast<int32_t>(position), static_cast<int32_t>(seen), static_cast<int32_t>(count));
  };
  if constexpr (sizeof(T) >= sizeof(float)) {
    constexpr int64_t kExact = int64_t{1} << std::numeric_limits<T>::digits;
    if (position < kExact && count - position < kExact) {
      row(exact_bias_row<T>);
      return;
    }
  }
  row(bias_row<T>);
}

/// Writes rows `begin` to `end - 1` of one head. The bias depends on `query - key` only, so each row is a part of one
/// longer row. In 16 bits a copy of that part takes a quarter of the time of computing it, because of the conversion.
/// In 32 and 64 bits computing takes no longer than a copy.
template <typename T>
void write_rows(const AlibiAddProblem& problem, int64_t head, int64_t begin, int64_t end) {
  const AlibiShape& shape = problem.shape;
  const auto out = [&](int64_t row) {
    return static_cast<T*>(problem.out.data) + problem.out.strides.row(0, head, row);
  };
  if (sizeof(T) >= sizeof(float) || end - begin == 1) {
    for (int64_t row = begin; row < end; ++row) {
      write_row(problem, head, shape.position(static_cast<int32_t>(row)), shape.k_len, out(row));
    }
    return;
  }
  const int64_t count = shape.k_len + end - begin - 1;
  const std::unique_ptr<T[]> longer(new T[count]);
  write_row(problem, head, shape.position(static_cast<int32_t>(end - 1)), count, longer.get());
  for (int64_t row = begin; row < end; ++row) {
    std::copy_n(longer.get() + end - 1 - row, shape.k_len, out(row));
  }
}

template <typename T>
void run_typed(const AlibiAddProblem& problem) {
  // The longer row of `write_rows` has fewer than 2^31 keys.
  constexpr int64_t kMostRows = 4096;
  constexpr int64_t kLongRow = int64_t{1} << 30;
  const AlibiShape& shape = problem.shape;
  TORCH_INTERNAL_ASSERT(problem.out.strides.key == 1);
  const int64_t most_rows = shape.k_len < kLongRow ? kMostRows : 1;
  const int64_t grain = std::max<int64_t>(1, cpu::kGrainElements / std::max<int32_t>(1, shape.k_len));
  at::parallel_for(0, shape.num_heads * shape.q_len, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end;) {
      const int64_t head = row / shape.q_len;
      const int64_t query = row % shape.q_len;
      const int64_t rows = std::min({end - row, shape.q_len - query, most_rows});
      write_rows<T>(problem, head, query, query + rows);
      row += rows;
    }
  });
}

void run(const AlibiAddProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run_typed<typename decltype(type)::type>(problem); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_bias", kernel<arguments::alibi_bias<run>>);
}

}  // namespace posenc
