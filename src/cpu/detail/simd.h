#pragma once

#include <cpu/detail/clones.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// Vectors of a fixed number of bytes. Functions are inlined into kernels that are compiled for an instruction set with
// registers of that size.
namespace posenc::cpu {

template <typename Real, int kBytes>
struct Simd {
  using Scalar = Real;
  using Bits = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;

  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(Real));

  typedef Real Vector __attribute__((vector_size(kBytes)));
  typedef Bits Integers __attribute__((vector_size(kBytes)));

  POSENC_ALWAYS_INLINE static Vector load(const Real* from) {
    Vector result;
    std::memcpy(&result, from, sizeof(result));
    return result;
  }

  POSENC_ALWAYS_INLINE static void store(Real* to, const Vector& x) { std::memcpy(to, &x, sizeof(x)); }

  POSENC_ALWAYS_INLINE static Vector all(Real x) { return x - Vector{}; }

  /// 0, 1, 2, ...
  POSENC_ALWAYS_INLINE static Vector iota() {
    Vector result{};
    for (int i = 0; i < kLanes; ++i) {
      result[i] = static_cast<Real>(i);
    }
    return result;
  }

  POSENC_ALWAYS_INLINE static Vector abs(const Vector& x) {
    constexpr Bits kMagnitude = std::is_same_v<Real, double> ? static_cast<Bits>(0x7fffffffffffffff) : 0x7fffffff;
    return (Vector)((Integers)x & kMagnitude);
  }

  /// The sum of all lanes, by halves.
  POSENC_ALWAYS_INLINE static Real sum(const Vector& x) {
    if constexpr (kLanes == 2) {
      return x[0] + x[1];
    } else {
      using Half = Simd<Real, kBytes / 2>;
      typename Half::Vector halves[2];
      std::memcpy(halves, &x, sizeof(x));
      return Half::sum(halves[0] + halves[1]);
    }
  }

  POSENC_ALWAYS_INLINE static Real max(const Vector& x) {
    Real result = x[0];
    for (int i = 1; i < kLanes; ++i) {
      result = x[i] > result ? x[i] : result;
    }
    return result;
  }
};

}  // namespace posenc::cpu
