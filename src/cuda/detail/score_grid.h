#pragma once

#include <arguments/alibi_problem.h>
#include <cuda/detail/launch.h>

#include <cuda_runtime.h>

// Assignment of blocks to scores [B, H, Sq, Sk]. No torch.
//
// Threads along x share the keys of a row, threads along y are queries. Consecutive blocks are keys first, then queries
// (x), then matrices [Sq, Sk] (y and z), which is the order of memory. A block has one head, and therefore one slope.
namespace posenc::cuda {

/// Threads along keys: smallest power of two that covers a row with `per_thread` vectors each, at most kMaxThreads.
inline int64_t threads_along_keys(int64_t num_vectors, int64_t per_thread) {
  int64_t threads = 1;
  while (threads < kMaxThreads && threads * per_thread < num_vectors) {
    threads *= 2;
  }
  return threads;
}

/// The matrices [Sq, Sk] of a call; that of batch b and head h has number b * H + h. Their number may exceed the limits
/// of gridDim.y and gridDim.z.
struct Matrices {
  uint32_t count;
  Divider num_heads;

  explicit Matrices(const AlibiShape& shape)
      : count(static_cast<uint32_t>(shape.batch * shape.num_heads)),
        num_heads(static_cast<uint32_t>(shape.num_heads)) {}

  /// A grid with `x` blocks for each matrix. Some of the last blocks have no matrix.
  dim3 grid(int64_t x) const {
    const int64_t z = ceil_div(count, kMaxGridY);
    return dim3(x, ceil_div(count, z), z);
  }

#if defined(__CUDACC__)
  struct Index {
    uint32_t batch, head;
  };

  /// The number of the matrix of this block; the block has none if this is not below `count`.
  __device__ static uint32_t of_block() { return blockIdx.z * gridDim.y + blockIdx.y; }

  __device__ Index index(uint32_t matrix) const {
    const uint32_t batch = num_heads.quotient(matrix);
    return {batch, matrix - batch * num_heads.divisor};
  }
#endif
};

inline bool is_empty(const AlibiShape& shape) {
  return shape.batch == 0 || shape.num_heads == 0 || shape.q_len == 0 || shape.k_len == 0;
}

}  // namespace posenc::cuda
