#pragma once

#include <algorithm>
#include <cstdint>

// Block and grid arithmetic. No torch.
namespace posenc::cuda {

constexpr int kWarp = 32;  // threads

/// Threads of a block, and blocks that an SM holds at least, which limits registers to 40. Time of the rotation of
/// 1 x 8192 x 64 heads of 128 relative to a copy of its bytes, measured on an H200: 1.02 to 1.03 with 128 threads, 1.04
/// to 1.05 with 256, 1.03 to 1.05 with 512, 1.25 with 32. A limit of 32 registers spills, 1.3.
constexpr int kMaxThreads = 128;
constexpr int kMinBlocks = 12;

/// Threads of a block for heads with a tail: 1.05 times the copy instead of 1.07, with rotary_dim 64 of 128 channels.
constexpr int kMaxThreadsWithTail = 64;

/// Hardware limits of blockDim.z, gridDim.x and gridDim.y.
constexpr int64_t kMaxBlockZ = 64;
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridY = 65535;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// Division by a number that is known on the host only, as a multiplication (Granlund and Montgomery 1994, figure 4.1).
/// GPUs have no integer division; the compiler's replacement takes about 20 instructions.
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

/// Divides the heads of a token evenly over the smallest number of blocks that holds them, so that few threads idle: 40
/// heads are three blocks of 14, not two of 16 and one of 8. With few heads a block processes several tokens. If the
/// tokens of a head are contiguous, a block processes one head and as many tokens as fit (1.07 instead of 1.09 times
/// the copy for [B, H, S, D], measured on an H200).
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
