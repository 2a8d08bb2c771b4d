#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>
#include <cuda/attention_kernel.cuh>

#include <algorithm>
#include <memory>

namespace posenc::cuda {
namespace {

/// One block for each tile of `rows` queries, head and sequence, or part of its keys.
dim3 grid_of(const AttentionForwardProblem& p, int64_t rows, int64_t splits) {
  const bool packed = p.cu_seqlens_q != nullptr;
  return {
      static_cast<unsigned>(packed ? p.q_tokens / rows + p.batch : ceil_div(p.q_len, rows)),
      static_cast<unsigned>(p.q_heads), static_cast<unsigned>((packed ? 1 : p.batch) * splits)};
}

/// The number of parts of the keys: as many as the GPU runs at once, with at least four tiles of keys each.
template <typename Tile>
int splits_of(const AttentionForwardProblem& p) {
  constexpr int64_t kFewestTiles = 4;
  constexpr int64_t kMostSplits = 64;
  const dim3 grid = grid_of(p, Tile::kRows, 1);
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  int device = 0;
  check(cudaGetDevice(&device));
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t idle = Tile::kBlocks * processors / blocks;
  const int64_t fitting = p.k_len / (kFewestTiles * Tile::kKeys);
  return static_cast<int>(std::clamp<int64_t>(std::min(idle, fitting), 1, std::min(kMostSplits, kMaxGridY / grid.z)));
}

template <typename T, int D>
void launch(AttentionForwardProblem p) {
  using Tile = AttentionTile<D>;
  p.splits = splits_of<Tile>(p);
  std::shared_ptr<void> parts;
  if (p.splits > 1) {
    p.rows = static_cast<int64_t>(p.q_heads) * (p.cu_seqlens_q != nullptr ? p.q_tokens : int64_t{p.batch} * p.q_len);
    const int64_t numbers = p.splits * p.rows * p.head_dim;
    parts = allocate((numbers + p.splits * p.rows) * static_cast<int64_t>(sizeof(float)));
    p.split_out = static_cast<float*>(parts.get());
    p.split_lse = p.split_out + numbers;
  }
  const auto kernel = attention_kernel<T, D>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kShared));
  kernel<<<grid_of(p, Tile::kRows, p.splits), Tile::kThreads, Tile::kShared, current_stream()>>>(p);
  check_launch();
  if (p.splits > 1) {
    attention_merge_kernel<T><<<grid_of(p, kMergeRows, 1), kMergeThreads, 0, current_stream()>>>(p);
    check_launch();
  }
}

}  // namespace

bool has_attention_kernels() {
  constexpr int kOldestCode = 80;
  int device = 0;
  check(cudaGetDevice(&device));
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major * 10 < kOldestCode) {
    return false;
  }
  // The architecture of the code that the driver chooses for this device.
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, attention_kernel<__half, 64>));
  return attributes.ptxVersion >= kOldestCode;
}

void attention_forward(const AttentionForwardProblem& problem, DType dtype) {
  for_16_bit(dtype, [&](auto type) {
    for_head_size(
        problem.head_dim, [&](auto size) { launch<typename decltype(type)::type, decltype(size)::value>(problem); });
  });
}

}  // namespace posenc::cuda
