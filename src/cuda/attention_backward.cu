#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>
#include <cuda/attention_backward_kernel.cuh>

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
  if (p.slope_sums != nullptr || p.row_sums != nullptr) {
    launch<T, D, Held::queries, true>(p);
  } else {
    launch<T, D, Held::queries, false>(p);
  }
}

}  // namespace

int64_t attention_query_tiles(const AttentionBackwardProblem& problem) {
  const dim3 grid = grid_of(problem, Held::queries, kAttentionHeldRows);
  return static_cast<int64_t>(grid.x) * grid.z;
}

void attention_backward(const AttentionBackwardProblem& problem, DType dtype) {
  for_16_bit(dtype, [&](auto type) {
    for_head_size(problem.head_dim, [&](auto size) {
      using T = typename decltype(type)::type;
      launch<T, decltype(size)::value>(problem);
    });
  });
}

}  // namespace posenc::cuda
