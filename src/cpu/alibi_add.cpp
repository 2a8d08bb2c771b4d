#include <contract/alibi.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/score_rows.h>

#include <torch/library.h>

#include <limits>

namespace posenc {
namespace {

/// One row, which may be the same memory for both.
template <typename T>
struct Row {
  const T* in;
  T* out;
  int64_t in_stride, out_stride;
};

/// The first `count` keys. Strides are 1 where `Dense`.
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
    out[j * out_stride] = static_cast<T>(static_cast<Real>(in[j * in_stride]) + bias);
  }
}

template <typename T>
void copy_row(const Row<T>& row, int32_t count) {
  for (int32_t j = 0; j < count; ++j) {
    row.out[j * row.out_stride] = row.in[j * row.in_stride];
  }
}

/// Adds the bias, or where there are no slopes copies; beyond what a query sees, writes `hidden`.
template <typename T>
void run(const AlibiAddProblem& problem, cpu::arithmetic_t<T> hidden) {
  using Real = cpu::arithmetic_t<T>;
  const AlibiShape& shape = problem.shape;
  const int64_t in_stride = problem.in.strides.key;
  const int64_t out_stride = problem.out.strides.key;
  const auto add = in_stride == 1 && out_stride == 1 ? add_row<T, true> : add_row<T, false>;
  cpu::for_each_row(shape, /*head_first=*/false, [&](const cpu::ScoreRow& at) {
    const Row<T> row{
        static_cast<const T*>(problem.in.data) + problem.in.strides.row(at.batch, at.head, at.query),
        static_cast<T*>(problem.out.data) + problem.out.strides.row(at.batch, at.head, at.query), in_stride,
        out_stride};
    const int32_t position = shape.position(at.query);
    const int32_t visible = shape.visible(position);
    if (problem.slopes.data != nullptr) {
      add(row, problem.slopes.slope<Real>(at.head), position, visible);
    } else {
      copy_row(row, visible);
    }
    for (int32_t j = visible; j < shape.k_len; ++j) {
      row.out[j * out_stride] = static_cast<T>(hidden);
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
  m.impl("alibi_add", contract::alibi_add<run_add>);
  m.impl("alibi_add_", contract::alibi_add_<run_add>);
  m.impl("alibi_mask", contract::alibi_mask<run_mask>);
}

}  // namespace posenc
