#include <arguments/alibi.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/score_rows.h>
#include <ops/dispatch.h>

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace posenc {
namespace {

using at::Tensor;

/// The sum of `grad * distance` over the first `count` keys. With `Dense` the stride is 1.
template <typename T, bool Dense>
POSENC_CPU_CLONES double sum_row(const T* grad, int64_t stride, int32_t position, int32_t count) {
  using Real = cpu::arithmetic_t<T>;
  const int64_t step = Dense ? 1 : stride;
  return cpu::moment_of_row<Real>(position, count, [&](int32_t j) { return static_cast<Real>(grad[j * step]); });
}

/// Sums each row, then the rows of each head in a fixed order.
template <typename T>
void run(const AlibiShape& shape, const ScoresIn& grad, cpu::arithmetic_t<T>* result) {
  std::vector<double> row_sums(shape.num_heads * shape.batch * shape.q_len);
  const auto sum = grad.strides.key == 1 ? sum_row<T, true> : sum_row<T, false>;
  cpu::for_each_row(shape, /*head_first=*/true, [&](const cpu::ScoreRow& row) {
    const T* data = static_cast<const T*>(grad.data) + grad.strides.row(row.batch, row.head, row.query);
    const int32_t position = shape.position(row.query);
    const int32_t visible = shape.visible(position);
    if (visible > 0) {
      row_sums[row.index] = grad.strides.key == 0  // one gradient for the whole row, as after sum()
          ? static_cast<double>(data[0]) * AlibiShape::sum_of_distances(position, visible)
          : sum(data, grad.strides.key, position, visible);
    }
  });
  cpu::sum_rows_of_heads(shape, row_sums.data(), result);
}

Tensor alibi_slopes_backward_cpu(const arguments::AlibiSlopesBackwardArguments<int64_t>& a) {
  const AlibiShape shape = arguments::alibi_slopes_backward_shape(a);
  const at::ScalarType dtype = a.grad.scalar_type();
  Tensor result = at::empty({shape.num_heads}, a.grad.options().dtype(arguments::alibi_slopes_dtype(dtype)));
  cpu::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run<T>(shape, arguments::scores_in(a.grad), result.mutable_data_ptr<cpu::arithmetic_t<T>>());
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_slopes_backward", kernel<alibi_slopes_backward_cpu>);
}

}  // namespace posenc
