#include <arguments/rotary_frequencies.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/lanes.h>
#include <ops/dispatch.h>

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

/// Computed in tensor operations: LibTorch's float64 cosine is vectorised for each instruction set, and that of the
/// standard library is not.
std::tuple<Tensor, Tensor> rotary_tables_cpu(const arguments::FrequenciesArguments<int64_t>& a) {
  arguments::check_frequencies(a);
  const Tensor wide = a.inv_freq.to(at::kDouble);
  const Tensor angles = at::outer(at::arange(a.length, wide.options()), wide);
  return {angles.cos().mul_(a.attention_factor).to(a.dtype), angles.sin().mul_(a.attention_factor).to(a.dtype)};
}

/// One row of the gradients and of the tables, from the first pair of a thread on; strides in elements.
template <typename T>
struct Row {
  const T *grad_cos, *grad_sin, *cos, *sin;
  int64_t grad_cos_stride, grad_sin_stride, cos_stride, sin_stride;
};

/// Adds the terms of one row to `sums`, float64 [count]. With `Dense` all strides are 1.
template <typename T, bool Dense>
POSENC_CPU_CLONES void add_row(const Row<T>& row, double position, int64_t count, double* sums) {
  const int64_t gc = Dense ? 1 : row.grad_cos_stride;
  const int64_t gs = Dense ? 1 : row.grad_sin_stride;
  const int64_t c = Dense ? 1 : row.cos_stride;
  const int64_t s = Dense ? 1 : row.sin_stride;
  POSENC_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const double along = static_cast<double>(row.cos[i * c]) * static_cast<double>(row.grad_sin[i * gs]);
    const double against = static_cast<double>(row.sin[i * s]) * static_cast<double>(row.grad_cos[i * gc]);
    sums[i] += position * (along - against);
  }
}

/// Sums over the positions for each pair. One thread sums a pair, in the order of positions, so that the result does
/// not depend on the number of threads.
template <typename T>
void run(const FrequenciesBackwardProblem& problem, double* sums) {
  const int64_t grain = std::max<int64_t>(1, cpu::kGrainElements / std::max<int64_t>(1, problem.length));
  const bool dense = problem.grad_cos.stride_pair == 1 && problem.grad_sin.stride_pair == 1 &&
      problem.cos.stride_pair == 1 && problem.sin.stride_pair == 1;
  const auto add = dense ? add_row<T, true> : add_row<T, false>;
  at::parallel_for(0, problem.num_pairs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t p = 0; p < problem.length; ++p) {
      const auto at = [&](const TableView& table) {
        return static_cast<const T*>(table.data) + p * table.stride_row + begin * table.stride_pair;
      };
      const Row<T> row{at(problem.grad_cos),    at(problem.grad_sin),         at(problem.cos),
                       at(problem.sin),         problem.grad_cos.stride_pair, problem.grad_sin.stride_pair,
                       problem.cos.stride_pair, problem.sin.stride_pair};
      add(row, static_cast<double>(p), end - begin, sums + begin);
    }
  });
}

Tensor rotary_tables_backward_cpu(const arguments::FrequenciesBackwardArguments& a) {
  const auto problem = arguments::frequencies_backward_problem(a);
  Tensor result = at::zeros({problem.num_pairs}, a.cos.options().dtype(at::kDouble));
  if (a.cos.scalar_type() == at::kDouble) {
    run<double>(problem, result.mutable_data_ptr<double>());
  } else {
    run<float>(problem, result.mutable_data_ptr<double>());
  }
  return result.to(a.dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_tables", kernel<rotary_tables_cpu>);
  m.impl("rotary_tables_backward", kernel<rotary_tables_backward_cpu>);
}

}  // namespace posenc
