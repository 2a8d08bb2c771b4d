#pragma once

#include <algorithm>
#include <cstdint>

// Block and grid arithmetic. No torch.
namespace posenc::cuda {

/// Threads of a block, and blocks that an SM holds at least, which caps registers at 40. Measured on an H200 for
/// the rotation of 1 x 8192 x 64 heads of 128, times the copy of its bytes: 128 threads 1.02 to 1.03, 256 threads
/// 1.04 to 1.05, 512 threads 1.03 to 1.05, 32 threads 1.25; a cap at 32 registers spills, 1.3.
constexpr int kMaxThreads = 128;
constexpr int kMinBlocks = 12;

/// Threads of a block whose heads have a tail: 1.05 times the copy instead of 1.07 with rotary_dim 64 of 128.
constexpr int kMaxThreadsWithTail = 64;

/// What the hardware allows along z of a block, and along x and y of a grid.
constexpr int64_t kMaxBlockZ = 64;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// Division by a number that only the host knows, as a multiplication (Granlund and Montgomery 1994, figure 4.1):
/// the hardware has none for integers, and its substitute is a chain of some 20 instructions.
struct Divider {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  /// `divisor` from 1 to 2^31 - 1.
  explicit Divider(uint32_t d) : divisor(d), shift(0) {
    while ((uint64_t{1} << shift) < d) {
      ++shift;
    }
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }

#if defined(__CUDACC__)
  /// `n / divisor` for n below 2^31.
  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
#endif
};

/// Threads of a block along chunks (x), heads (y) and tokens (z).
struct BlockShape {
  int64_t chunks, heads, tokens;
};

/// Divides the heads of a token evenly over as few blocks as hold them, so that no block idles (40 heads make
/// three blocks of 14, not two of 16 and one of 8); with few heads a block takes several tokens. Where the tokens
/// of a head are neighbours in memory, a block takes one head and as many of them as it can (1.07 instead of 1.09
/// times the copy for [B, H, S, D], measured on an H200).
inline BlockShape block_shape(
    int64_t max_threads,
    int64_t num_chunks,
    int64_t num_heads,
    int64_t num_tokens,
    bool tokens_first) {
  const int64_t chunks = std::min(num_chunks, max_threads);
  const int64_t rows = max_threads / chunks;
  const int64_t heads = tokens_first ? 1 : ceil_div(num_heads, ceil_div(num_heads, rows));
  const int64_t tokens = std::min({rows / heads, num_tokens, kMaxBlockZ});
  return {chunks, heads, tokens};
}

}  // namespace posenc::cuda
