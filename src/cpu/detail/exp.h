#pragma once

#include <cpu/detail/simd.h>

#include <limits>
#include <type_traits>

namespace posenc::cpu {

/// exp(x) with an error of at most 2 units in the last place: Cody and Waite's reduction by ln 2, then a polynomial
/// (Cephes' expf in float32, Taylor's in float64). Zero below the normal range, where LibTorch's exp takes ten times
/// longer; infinity above the range; NaN stays NaN.
template <typename S>
POSENC_ALWAYS_INLINE typename S::Vector exponential(const typename S::Vector& x) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  using Integers = typename S::Integers;
  constexpr bool kDouble = std::is_same_v<Real, double>;
  constexpr auto kLog2E = static_cast<Real>(1.4426950408889634074);
  // 1.5 * 2^23 or 1.5 * 2^52: adding it rounds a small number to an integer, which is in the low bits of the sum.
  constexpr Real kRound = kDouble ? static_cast<Real>(6755399441055744.0) : static_cast<Real>(12582912.0);
  // ln 2 in two parts. The first has trailing zeros, so its products with n are exact without fused multiply-add.
  constexpr Real kLn2High = kDouble ? static_cast<Real>(6.93145751953125e-1) : static_cast<Real>(0.693359375);
  constexpr Real kLn2Low = kDouble ? static_cast<Real>(1.42860682030941723212e-6) : static_cast<Real>(-2.12194440e-4);
  constexpr int kFraction = kDouble ? 52 : 23;
  // exp(kLowest) is just above the smallest normal number, and exp(kHighest) just below the largest one.
  constexpr Real kLowest = kDouble ? static_cast<Real>(-708.0) : static_cast<Real>(-87.0);
  constexpr Real kHighest = kDouble ? static_cast<Real>(709.782712893384) : static_cast<Real>(88.72283);

  const Vector shifted = x * kLog2E + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (x - n * kLn2High) - n * kLn2Low;
  Vector p;
  if constexpr (kDouble) {
    p = r * Real(1.0 / 6227020800.0) + Real(1.0 / 479001600.0);
    p = p * r + Real(1.0 / 39916800.0);
    p = p * r + Real(1.0 / 3628800.0);
    p = p * r + Real(1.0 / 362880.0);
    p = p * r + Real(1.0 / 40320.0);
    p = p * r + Real(1.0 / 5040.0);
    p = p * r + Real(1.0 / 720.0);
    p = p * r + Real(1.0 / 120.0);
    p = p * r + Real(1.0 / 24.0);
    p = p * r + Real(1.0 / 6.0);
    p = p * r + Real(0.5);
  } else {
    p = r * Real(1.9875691500e-4) + Real(1.3981999507e-3);
    p = p * r + Real(8.3334519073e-3);
    p = p * r + Real(4.1665795894e-2);
    p = p * r + Real(1.6666665459e-1);
    p = p * r + Real(5.0000001201e-1);
  }
  p = (p * r) * r + r + Real(1);
  // p is between 0.7 and 1.42. Adding n to its exponent multiplies it by 2^n.
  const Vector power = (Vector)((Integers)p + ((Integers)shifted << kFraction));
  const Vector zero{};
  const Vector nan_or_infinity = x * S::all(std::numeric_limits<Real>::infinity());
  const Vector result = x < kLowest ? zero : power;
  return x <= kHighest ? result : nan_or_infinity;
}

}  // namespace posenc::cpu
