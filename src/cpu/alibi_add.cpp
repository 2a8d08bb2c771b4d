#include <contract/alibi.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/score_rows.h>

#include <torch/library.h>

#include <limits>

namespace posenc {
namespace {

using at::Tensor;

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

void run_add(const AlibiAddProblem& problem, at::ScalarType dtype) {
  cpu::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run<T>(problem, -std::numeric_limits<cpu::arithmetic_t<T>>::infinity());
  });
}

Tensor alibi_add_cpu(const Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  auto problem = contract::alibi_add_problem({"posenc::alibi_add", causal, query_offset}, scores, slopes);
  Tensor output = contract::allocate_output(scores, problem.out);
  run_add(problem, scores.scalar_type());
  return output;
}

Tensor& alibi_add_cpu_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  run_add(
      contract::alibi_add_in_place_problem({"posenc::alibi_add_", causal, query_offset}, scores, slopes),
      scores.scalar_type());
  return scores;
}

Tensor alibi_mask_cpu(const Tensor& grad, std::optional<int64_t> query_offset) {
  auto problem = contract::alibi_mask_problem({"posenc::alibi_mask", /*causal=*/true, query_offset}, grad);
  Tensor output = contract::allocate_output(grad, problem.out);
  cpu::for_dtype(grad.scalar_type(), [&](auto type) { run<typename decltype(type)::type>(problem, 0); });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_add", alibi_add_cpu);
  m.impl("alibi_add_", alibi_add_cpu_);
  m.impl("alibi_mask", alibi_mask_cpu);
}

}  // namespace posenc
