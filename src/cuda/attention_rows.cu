#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>

#include <algorithm>
#include <cuda/attention_rows_kernel.cuh>

namespace posenc::cuda {
namespace {

dim3 grid_of(const AttentionRowsProblem& p) {
  return {static_cast<unsigned>(p.rows), static_cast<unsigned>(p.q_heads), static_cast<unsigned>(p.batch)};
}

}  // namespace

void attention_softmax_rows(const AttentionRowsProblem& problem, DType dtype) {
  for_real(dtype, [&](auto type) {
    using Real = typename decltype(type)::type;
    attention_softmax_rows_kernel<Real><<<grid_of(problem), kAttentionRowThreads, 0, current_stream()>>>(problem);
    check_launch();
  });
}

void attention_gradient_rows(const AttentionRowsProblem& problem, DType dtype) {
  for_real(dtype, [&](auto type) {
    using Real = typename decltype(type)::type;
    for_bool(problem.row_sums != nullptr, [&](auto row_sums) {
      attention_gradient_rows_kernel<Real, decltype(row_sums)::value>
          <<<grid_of(problem), kAttentionRowThreads, 0, current_stream()>>>(problem);
      check_launch();
    });
  });
}

void attention_find_infinities(const AttentionRowsProblem& problem, DType dtype) {
  constexpr int64_t kBlocks = 64;  // of a head
  const int64_t numbers = static_cast<int64_t>(problem.k_len) * problem.head_dim;
  const dim3 grid(
      static_cast<unsigned>(std::min(kBlocks, ceil_div(numbers, kAttentionRowThreads))),
      static_cast<unsigned>(problem.batch * (problem.q_heads / problem.group)));
  for_real(dtype, [&](auto type) {
    using Real = typename decltype(type)::type;
    attention_find_infinities_kernel<Real><<<grid, kAttentionRowThreads, 0, current_stream()>>>(problem);
    check_launch();
  });
}

void attention_add_infinities(const AttentionRowsProblem& problem, DType dtype) {
  // Heads with infinities are rare, and the blocks of all others end at once: few blocks end sooner.
  constexpr unsigned kBlocks = 16;  // of a head
  dim3 grid = grid_of(problem);
  grid.x = std::min(grid.x, kBlocks);
  for_real(dtype, [&](auto type) {
    using Real = typename decltype(type)::type;
    attention_add_infinities_kernel<Real><<<grid, kAttentionRowThreads, 0, current_stream()>>>(problem);
    check_launch();
  });
}

}  // namespace posenc::cuda
