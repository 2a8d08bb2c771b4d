#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>

#include <cuda/attention_backward_kernel.cuh>
#include <memory>

namespace posenc::cuda {
namespace {

/// One block for each tile of `rows` queries or keys, head and sequence.
dim3 grid_of(const AttentionBackwardProblem& p, Held held, int64_t rows) {
  const bool of_keys = held == Held::keys;
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t tiles =
      packed ? (of_keys ? p.k_tokens : p.q_tokens) / rows + p.batch : ceil_div(of_keys ? p.k_len : p.q_len, rows);
  return {
      static_cast<unsigned>(tiles), static_cast<unsigned>(of_keys ? p.q_heads / p.group : p.q_heads),
      static_cast<unsigned>(packed ? 1 : p.batch)};
}

template <typename T, int D, Held kHeld, bool kSlopeSums>
void launch(const AttentionBackwardProblem& p) {
  using Tile = AttentionBackwardTile<D>;
  const auto kernel = attention_backward_kernel<T, D, kHeld, kSlopeSums>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared));
  kernel<<<grid_of(p, kHeld, Tile::kHeld), Tile::kThreads, Tile::kShared, current_stream()>>>(p);
  check_launch();
}

template <typename T, int D>
void launch(const AttentionBackwardProblem& p) {
  attention_row_terms_kernel<T><<<grid_of(p, Held::queries, kRowTermsRows), kRowTermsThreads, 0, current_stream()>>>(p);
  check_launch();
  if (p.grad_k != nullptr) {
    launch<T, D, Held::keys, false>(p);
  }
  const bool sums = p.grad_slopes != nullptr || p.row_sums != nullptr;
  if (sums) {
    AttentionBackwardProblem of_slopes = p;
    const bool apart = p.softcap != 0;
    of_slopes.grad_q = apart ? nullptr : p.grad_q;
    launch<T, D, Held::queries, true>(of_slopes);
  }
  if (p.grad_q != nullptr && (!sums || p.softcap != 0)) {
    launch<T, D, Held::queries, false>(p);
  }
}

/// Adds up the sums of all tiles, of each sequence if slopes differ between sequences.
void launch_slopes(const AttentionBackwardProblem& p, int64_t tiles) {
  const dim3 grid(p.q_heads, p.slopes_stride == 0 ? 1 : p.batch);
  attention_grad_slopes_kernel<<<grid, kGradSlopesThreads, 0, current_stream()>>>(p, tiles);
  check_launch();
}

}  // namespace

void attention_backward(AttentionBackwardProblem problem, DType dtype) {
  const dim3 grid = grid_of(problem, Held::queries, kAttentionHeldRows);
  const int64_t tiles = static_cast<int64_t>(grid.x) * grid.z;
  std::shared_ptr<void> sums;
  if (problem.grad_slopes != nullptr) {
    const int64_t bytes = tiles * problem.q_heads * static_cast<int64_t>(sizeof(double));
    sums = allocate(bytes);
    problem.slope_sums = static_cast<double*>(sums.get());
    // Some tiles of packed sequences do not exist.
    check(cudaMemsetAsync(problem.slope_sums, 0, bytes, current_stream()));
  }
  for_16_bit(dtype, [&](auto type) {
    for_head_size(problem.head_dim, [&](auto size) {
      using T = typename decltype(type)::type;
      launch<T, decltype(size)::value>(problem);
    });
  });
  if (problem.grad_slopes != nullptr) {
    launch_slopes(problem, tiles);
  }
}

}  // namespace posenc::cuda
