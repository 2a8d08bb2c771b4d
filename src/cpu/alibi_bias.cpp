#include <arguments/alibi.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/streamed_rows.h>
#include <ops/dispatch.h>

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
  const auto write = [&](const cpu::ScoreRow& row, int32_t begin, int32_t seen, int32_t count, T* out) {
    bias_row<T>(out, problem.slopes.slope<Real>(row.head), shape.position(row.query) - begin, seen);
    std::fill(out + seen, out + count, static_cast<T>(-std::numeric_limits<Real>::infinity()));
  };
  if (cpu::is_streamed<T>(shape, problem.out)) {
    cpu::stream_rows<T>(shape, problem.out, write);
    return;
  }
  cpu::for_each_row(shape, /*head_first=*/false, [&](const cpu::ScoreRow& row) {
    T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(row.batch, row.head, row.query);
    write(row, 0, shape.visible(shape.position(row.query)), shape.k_len, out);
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
