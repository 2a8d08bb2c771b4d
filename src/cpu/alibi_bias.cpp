#include <contract/alibi.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/score_rows.h>

#include <torch/library.h>

#include <algorithm>
#include <limits>

namespace posenc {
namespace {

template <typename T>
POSENC_CPU_CLONES void bias_row(T* out, cpu::arithmetic_t<T> slope, int32_t position, int32_t count) {
  using Real = cpu::arithmetic_t<T>;
  POSENC_INDEPENDENT
  for (int32_t j = 0; j < count; ++j) {
    out[j] = static_cast<T>(-slope * static_cast<Real>(AlibiShape::distance(position, j)));
  }
}

template <typename T>
void run_typed(const AlibiAddProblem& problem) {
  using Real = cpu::arithmetic_t<T>;
  const AlibiShape& shape = problem.shape;
  cpu::for_each_row(shape, /*head_first=*/false, [&](const cpu::ScoreRow& row) {
    T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(row.batch, row.head, row.query);
    const int32_t position = shape.position(row.query);
    const int32_t visible = shape.visible(position);
    bias_row<T>(out, problem.slopes.slope<Real>(row.head), position, visible);
    std::fill(out + visible, out + shape.k_len, static_cast<T>(-std::numeric_limits<Real>::infinity()));
  });
}

void run(const AlibiAddProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run_typed<typename decltype(type)::type>(problem); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_bias", contract::alibi_bias<run>);
}

}  // namespace posenc
