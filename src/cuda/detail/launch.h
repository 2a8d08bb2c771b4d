#pragma once

#include <algorithm>
#include <cstdint>

// Block and grid arithmetic. No torch.
namespace posenc::cuda {

/// Threads of a block. 256 leaves an SM with eight blocks to schedule around each other's memory latency; 512 for
/// one token lost a third of the bandwidth on GQA (measured on an H200).
constexpr int kMaxThreads = 256;

/// What the hardware allows along z of a block and y of a grid.
constexpr int64_t kMaxBlockZ = 64;
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
  __device__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
#endif
};

/// Threads of a block along chunks (x), heads (y) and tokens (z).
struct BlockShape {
  int64_t chunks, heads, tokens;
};

/// Divides the heads of a token evenly over as few blocks as hold them, so that no block idles (40 heads make
/// two blocks of 20, not one of 32 and one of 8); with few heads a block takes several tokens.
inline BlockShape block_shape(int64_t num_chunks, int64_t num_heads, int64_t num_tokens) {
  const int64_t chunks = std::min<int64_t>(num_chunks, kMaxThreads);
  const int64_t rows = kMaxThreads / chunks;
  const int64_t heads = ceil_div(num_heads, ceil_div(num_heads, rows));
  const int64_t tokens = std::min({rows / heads, num_tokens, kMaxBlockZ});
  return {chunks, heads, tokens};
}

}  // namespace posenc::cuda
