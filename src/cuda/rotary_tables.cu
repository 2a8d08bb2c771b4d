#include <cuda/detail/dispatch.h>
#include <cuda/kernels.h>
#include <cuda/detail/reduce.cuh>
#include <cuda/rotary_tables_backward_kernel.cuh>
#include <cuda/rotary_tables_kernel.cuh>

#include <algorithm>

namespace posenc::cuda {
namespace {

/// Rows of a block at least, and blocks that share a pair at most: enough blocks for every SM, and few enough sums for
/// the second kernel.
constexpr int64_t kRowsPerBlock = 32;
constexpr int64_t kMaxRowGroups = 2048;

}  // namespace

void rotary_tables(const FrequenciesProblem& problem, DType frequencies, DType tables) {
  const int64_t pairs = std::min<int64_t>(problem.num_pairs, kMaxThreads);
  const int64_t rows = kMaxThreads / pairs;
  const int64_t row_groups = ceil_div(problem.length, rows);
  const int64_t pair_groups = ceil_div(problem.num_pairs, pairs);
  check(
      row_groups <= kMaxGridX && pair_groups <= kMaxGridY, "posenc::rotary_tables: expected at most ", kMaxGridX * rows,
      " rows and ", kMaxGridY * pairs, " pairs on CUDA, got ", problem.length, " and ", problem.num_pairs);
  const dim3 grid(row_groups, pair_groups);
  const dim3 block(pairs, rows);
  for_real(frequencies, [&](auto frequency) {
    for_real(tables, [&](auto table) {
      rotary_tables_kernel<typename decltype(frequency)::type, typename decltype(table)::type>
          <<<grid, block, 0, current_stream()>>>(problem);
      check_launch();
    });
  });
}

void rotary_tables_backward(const FrequenciesBackwardProblem& problem, DType tables, void* result, DType result_dtype) {
  const int64_t pairs = std::min<int64_t>(problem.num_pairs, kMaxThreads);
  const int64_t rows_per_block = std::max(kRowsPerBlock, ceil_div(problem.length, kMaxRowGroups));
  const int64_t row_groups = ceil_div(problem.length, rows_per_block);
  const int64_t pair_groups = ceil_div(problem.num_pairs, pairs);
  check(
      pair_groups <= kMaxGridY, "posenc::rotary_tables_backward: expected at most ", kMaxGridY * pairs,
      " pairs on CUDA, got ", problem.num_pairs);
  const auto memory = allocate(problem.num_pairs * row_groups * static_cast<int64_t>(sizeof(double)));
  auto* const sums = static_cast<double*>(memory.get());
  const dim3 grid(row_groups, pair_groups);
  const dim3 block(pairs, kMaxThreads / pairs);
  const cudaStream_t stream = current_stream();
  for_real(tables, [&](auto table) {
    rotary_tables_backward_kernel<typename decltype(table)::type>
        <<<grid, block, 0, stream>>>(problem, rows_per_block, sums);
    check_launch();
  });
  for_real(result_dtype, [&](auto type) {
    using Real = typename decltype(type)::type;
    sum_of_heads_kernel<Real>
        <<<dim3(problem.num_pairs), kHeadSumThreads, 0, stream>>>(sums, row_groups, static_cast<Real*>(result));
    check_launch();
  });
}

}  // namespace posenc::cuda
