#include <arguments/rotary_embedding_tables_backward.h>
#include <cpu/detail/dispatch.h>
#include <ops/dispatch.h>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;

/// Adds the terms of one token, over all heads of one operand, to the sums of some pairs of its row of the tables.
template <typename T>
void add_token(
    const RotaryTablesProblem& problem,
    const RotaryTablesProblem::Operand& operand,
    int64_t token,
    const std::vector<int64_t>& pairs,
    std::vector<double>& sum_cos,
    std::vector<double>& sum_sin) {
  const int64_t batch = token / problem.seq_len;
  const int64_t seq = token % problem.seq_len;
  const Strides& gs = operand.grad_strides;
  const Strides& xs = operand.input_strides;
  for (int64_t h = 0; h < operand.num_heads; ++h) {
    const T* g = static_cast<const T*>(operand.grad) + batch * gs.batch + seq * gs.seq + h * gs.head;
    const T* x = static_cast<const T*>(operand.input) + batch * xs.batch + seq * xs.seq + h * xs.head;
    for (const int64_t i : pairs) {
      const int64_t first = problem.interleaved ? 2 * i : i;
      const int64_t second = problem.interleaved ? 2 * i + 1 : i + problem.num_pairs;
      const auto g1 = static_cast<double>(g[first * gs.channel]);
      const auto g2 = static_cast<double>(g[second * gs.channel]);
      const auto x1 = static_cast<double>(x[first * xs.channel]);
      const auto x2 = static_cast<double>(x[second * xs.channel]);
      sum_cos[i] += g1 * x1 + g2 * x2;
      sum_sin[i] += g2 * x1 - g1 * x2;
    }
  }
}

/// The pairs that read each axis of the positions; all pairs in one list if there is one axis or none.
std::vector<std::vector<int64_t>> pairs_of_axes(const RotaryTablesProblem& problem) {
  const int64_t num_axes = std::max<int64_t>(1, problem.num_axes);
  std::vector<std::vector<int64_t>> pairs(static_cast<size_t>(num_axes));
  for (int64_t i = 0; i < problem.num_pairs; ++i) {
    pairs[num_axes == 1 ? 0 : problem.pair_axes.axis(i)].push_back(i);
  }
  return pairs;
}

/// Every row of the tables is summed by one thread, in a fixed order.
template <typename T>
void run(const RotaryTablesProblem& problem) {
  using Real = cpu::arithmetic_t<T>;
  const std::vector<std::vector<int64_t>> pairs = pairs_of_axes(problem);
  at::parallel_for(0, problem.table_rows, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    std::vector<double> sum_cos(problem.num_pairs);
    std::vector<double> sum_sin(problem.num_pairs);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sum_cos.begin(), sum_cos.end(), 0.0);
      std::fill(sum_sin.begin(), sum_sin.end(), 0.0);
      for (size_t axis = 0; axis < pairs.size(); ++axis) {
        const RotaryTablesProblem::Readers readers = problem.readers(row, static_cast<int64_t>(axis));
        for (int64_t t = 0; t < readers.count; ++t) {
          for (int32_t i = 0; i < problem.num_operands; ++i) {
            add_token<T>(problem, problem.operands[i], readers.token(t), pairs[axis], sum_cos, sum_sin);
          }
        }
      }
      Real* grad_cos = static_cast<Real*>(problem.grad_cos) + row * problem.num_pairs;
      Real* grad_sin = static_cast<Real*>(problem.grad_sin) + row * problem.num_pairs;
      for (int64_t i = 0; i < problem.num_pairs; ++i) {
        grad_cos[i] = static_cast<Real>(sum_cos[i]);
        grad_sin[i] = static_cast<Real>(problem.conjugate ? -sum_sin[i] : sum_sin[i]);
      }
    }
  });
}

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_cpu(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  const auto call = arguments::rotary_tables_call(rotation, grads, inputs);
  cpu::for_dtype(inputs[0].scalar_type(), [&](auto type) { run<typename decltype(type)::type>(call.problem); });
  return {call.grad_cos, call.grad_sin};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_embedding_tables_backward", kernel<rotary_embedding_tables_backward_cpu>);
}

}  // namespace posenc
