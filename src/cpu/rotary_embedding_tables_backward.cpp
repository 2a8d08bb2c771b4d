#include <contract/rotary_embedding_tables_backward.h>
#include <cpu/detail/dispatch.h>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;

/// Adds what one token contributes to its row of the tables, over all heads of one operand.
template <typename T>
void add_token(
    const RotaryTablesProblem& problem,
    const RotaryTablesProblem::Operand& operand,
    int64_t token,
    std::vector<double>& sum_cos,
    std::vector<double>& sum_sin) {
  const int64_t batch = token / problem.seq_len;
  const int64_t seq = token % problem.seq_len;
  const Strides& gs = operand.grad_strides;
  const Strides& xs = operand.input_strides;
  for (int64_t h = 0; h < operand.num_heads; ++h) {
    const T* g = static_cast<const T*>(operand.grad) + batch * gs.batch + seq * gs.seq + h * gs.head;
    const T* x = static_cast<const T*>(operand.input) + batch * xs.batch + seq * xs.seq + h * xs.head;
    for (int64_t i = 0; i < problem.num_pairs; ++i) {
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

/// Every row of the tables is summed by one thread, in one order.
template <typename T>
void run(const RotaryTablesProblem& problem) {
  using Real = cpu::arithmetic_t<T>;
  at::parallel_for(0, problem.table_rows, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    std::vector<double> sum_cos(problem.num_pairs);
    std::vector<double> sum_sin(problem.num_pairs);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sum_cos.begin(), sum_cos.end(), 0.0);
      std::fill(sum_sin.begin(), sum_sin.end(), 0.0);
      const int64_t num_tokens = problem.num_tokens(row);
      for (int64_t t = 0; t < num_tokens; ++t) {
        for (int32_t i = 0; i < problem.num_operands; ++i) {
          add_token<T>(problem, problem.operands[i], problem.token(row, t), sum_cos, sum_sin);
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
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& table,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate) {
  const auto call = contract::rotary_tables_call(
      {"posenc::rotary_embedding_tables_backward", grads, inputs, table, positions, interleaved, conjugate});
  cpu::for_dtype(inputs[0].scalar_type(), [&](auto type) { run<typename decltype(type)::type>(call.problem); });
  return {call.grad_cos, call.grad_sin};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_embedding_tables_backward", rotary_embedding_tables_backward_cpu);
}

}  // namespace posenc
