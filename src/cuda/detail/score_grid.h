#pragma once

#include <contract/alibi_problem.h>
#include <cuda/detail/launch.h>

#include <cuda_runtime.h>

#include <algorithm>

// How blocks are laid over scores [B, H, Sq, Sk]. No torch.
//
// Threads along x share the keys of a row, threads along y are queries. Blocks go through keys first, then queries
// (x), heads (y) and batches (z), and so through memory in its order; the head of a block is one, and so is its slope.
namespace posenc::cuda {

constexpr int kWarp = 32;

/// Threads along keys: the smallest power of two that covers a row with `per_thread` vectors each, up to a block.
inline int64_t threads_along_keys(int64_t num_vectors, int64_t per_thread) {
  int64_t threads = 1;
  while (threads < kMaxThreads && threads * per_thread < num_vectors) {
    threads *= 2;
  }
  return threads;
}

/// Whether a grid of `x` blocks for each head can be launched.
inline bool fits_grid(int64_t x, const AlibiShape& shape) {
  return x <= kMaxGridX && shape.num_heads <= kMaxGridY && shape.batch <= kMaxGridY;
}

inline bool is_empty(const AlibiShape& shape) {
  return shape.batch == 0 || shape.num_heads == 0 || shape.q_len == 0 || shape.k_len == 0;
}

}  // namespace posenc::cuda
