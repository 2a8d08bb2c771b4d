#include <arguments/alibi.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/score_rows.h>
#include <cpu/detail/streamed_rows.h>
#include <ops/dispatch.h>

#include <torch/library.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace posenc {
namespace {

/// One row. `in` and `out` may be the same memory.
template <typename T>
struct Row {
  const T* in;
  T* out;
  int64_t in_stride, out_stride;
};

/// Rounds to nearest, ties to even. The conversion of LibTorch also tests each number for NaN, which takes a tenth of
/// the time of a sum in bfloat16. A NaN whose lower half is zero, as every NaN that was bfloat16, rounds to itself.
template <typename T>
POSENC_ALWAYS_INLINE T narrow(cpu::arithmetic_t<T> value) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t half = 0x7fff + ((bits >> 16) & 1);
    return {static_cast<uint16_t>((bits + half) >> 16), at::BFloat16::from_bits()};
  } else {
    return static_cast<T>(value);
  }
}

/// Adds to the first `count` keys. With `Dense` all strides are 1.
template <typename T, bool Dense>
POSENC_CPU_CLONES void add_row(const Row<T>& row, cpu::arithmetic_t<T> slope, int32_t position, int32_t count) {
  using Real = cpu::arithmetic_t<T>;
  const T* in = row.in;
  T* out = row.out;
  const int64_t in_stride = Dense ? 1 : row.in_stride;
  const int64_t out_stride = Dense ? 1 : row.out_stride;
  POSENC_INDEPENDENT
  for (int32_t j = 0; j < count; ++j) {
    const Real bias = -slope * static_cast<Real>(AlibiShape::distance(position, j));
    out[j * out_stride] = narrow<T>(static_cast<Real>(in[j * in_stride]) + bias);
  }
}

template <typename T>
void copy_row(const Row<T>& row, int32_t count) {
  for (int32_t j = 0; j < count; ++j) {
    row.out[j * row.out_stride] = row.in[j * row.in_stride];
  }
}

/// The rows of a call, and the value for keys that a query does not see.
template <typename T>
struct Rows {
  const AlibiAddProblem& problem;
  T hidden;

  Row<T> row(const cpu::ScoreRow& at) const {
    return {
        static_cast<const T*>(problem.in.data) + problem.in.strides.row(at.batch, at.head, at.query),
        static_cast<T*>(problem.out.data) + problem.out.strides.row(at.batch, at.head, at.query),
        problem.in.strides.key, problem.out.strides.key};
  }

  /// Adds the bias to the first `visible` keys, or copies them without slopes. Sets the others of `count` to `hidden`.
  template <bool Dense>
  void write(const Row<T>& row, int64_t head, int32_t position, int32_t visible, int32_t count) const {
    if (problem.slopes.data != nullptr) {
      using Real = cpu::arithmetic_t<T>;
      const Real slope = problem.slopes.slope<Real>(head);
      add_row<T, Dense>(row, std::isnan(slope) ? std::numeric_limits<Real>::quiet_NaN() : slope, position, visible);
    } else {
      copy_row(row, visible);
    }
    for (int32_t j = visible; j < count; ++j) {
      row.out[j * row.out_stride] = hidden;
    }
  }
};

template <typename T>
void run(const AlibiAddProblem& problem, cpu::arithmetic_t<T> hidden) {
  const Rows<T> rows{problem, static_cast<T>(hidden)};
  const AlibiShape& shape = problem.shape;
  // In place, the cache line that is written has just been read, and bypassing the caches saves nothing.
  const bool in_place = problem.in.data == problem.out.data;
  if (!in_place && problem.in.strides.key == 1 && cpu::is_streamed<T>(shape, problem.out)) {
    cpu::stream_rows<T>(
        shape, problem.out, [&](const cpu::ScoreRow& at, int32_t begin, int32_t seen, int32_t count, T* block) {
          const Row<T> row{rows.row(at).in + begin, block, 1, 1};
          rows.template write<true>(row, at.head, shape.position(at.query) - begin, seen, count);
        });
    return;
  }
  const bool dense = problem.in.strides.key == 1 && problem.out.strides.key == 1;
  cpu::for_each_row(shape, /*head_first=*/false, [&](const cpu::ScoreRow& at) {
    const int32_t position = shape.position(at.query);
    const int32_t visible = shape.visible(position);
    if (dense) {
      rows.template write<true>(rows.row(at), at.head, position, visible, shape.k_len);
    } else {
      rows.template write<false>(rows.row(at), at.head, position, visible, shape.k_len);
    }
  });
}

void run_add(const AlibiAddProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    run<T>(problem, -std::numeric_limits<cpu::arithmetic_t<T>>::infinity());
  });
}

void run_mask(const AlibiAddProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run<typename decltype(type)::type>(problem, 0); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_add", kernel<arguments::alibi_add<run_add>>);
  m.impl("alibi_add_", kernel<arguments::alibi_add_in_place<run_add>>);
  m.impl("alibi_mask", kernel<arguments::alibi_mask<run_mask>>);
}

}  // namespace posenc
