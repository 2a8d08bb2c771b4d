#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// Stores that bypass the caches, for results that are larger than the caches. An ordinary store reads its cache line
// first. Measured on two cores of an AMD EPYC: 1.8 instead of 2.5 ms to add the bias to 67 MB in place.
namespace posenc::cpu {

/// Size in bytes from which results are streamed. They exceed the share of a core in any cache.
constexpr int64_t kStreamedBytes = 32 << 20;

/// Alignment in bytes of the begin and end of a streamed range.
constexpr int64_t kStreamAlignment = 16;

#if defined(__SSE2__)

constexpr bool kStreams = true;

/// Copies `bytes` bytes; both addresses and the number are multiples of `kStreamAlignment`.
inline void stream(const void* from, void* to, int64_t bytes) {
  const auto* const source = static_cast<const __m128i*>(from);
  auto* const destination = static_cast<__m128i*>(to);
  for (int64_t i = 0; i < bytes / kStreamAlignment; ++i) {
    _mm_stream_si128(destination + i, _mm_load_si128(source + i));
  }
}

/// Makes the streamed stores of this thread visible to other threads. They are not ordered with other stores.
inline void finish_streaming() {
  _mm_sfence();
}

#else

constexpr bool kStreams = false;

inline void stream(const void*, void*, int64_t) {
}
inline void finish_streaming() {
}

#endif

}  // namespace posenc::cpu
