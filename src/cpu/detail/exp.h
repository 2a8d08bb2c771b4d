#pragma once

#include <cpu/detail/simd.h>

#include <type_traits>

namespace posenc::cpu {

/// exp(x) with an error of at most 2 units in the last place: Cody and Waite's reduction by ln 2, then a polynomial
/// (Cephes' expf in float32, Taylor's in float64). Zero below -86.9 (float64: -708), close to the end of the normal
/// range, where LibTorch's exp takes ten times longer. Infinity above the range; NaN stays NaN.
template <typename S>
POSENC_ALWAYS_INLINE typename S::Vector exponential(const typename S::Vector& argument) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  using Integers = typename S::Integers;
  using Bits = typename S::Bits;
  constexpr bool kDouble = std::is_same_v<Real, double>;
  constexpr auto kLog2E = static_cast<Real>(1.4426950408889634074);
  // 1.5 * 2^23 or 1.5 * 2^52: adding it rounds a small number to an integer, which is in the low bits of the sum.
  constexpr auto kRound = static_cast<Real>(kDouble ? 6755399441055744.0 : 12582912.0);
  // ln 2 in two parts. The first has trailing zeros, so its products with n are exact without fused multiply-add.
  constexpr auto kLn2High = static_cast<Real>(kDouble ? 6.93145751953125e-1 : 0.693359375);
  constexpr auto kLn2Low = static_cast<Real>(kDouble ? 1.42860682030941723212e-6 : -2.12194440e-4);
  constexpr int kFractionBits = kDouble ? 52 : 23;
  constexpr Bits kExponentOfHalf = kDouble ? 1022 : 126;
  constexpr auto kLowest = static_cast<Real>(kDouble ? -708.0 : -86.9);
  constexpr auto kBeyond = static_cast<Real>(kDouble ? 710.0 : 89.0);  // its exponential is above the range

  const Vector x = kBeyond < argument ? S::all(kBeyond) : argument;
  const Vector shifted = x * kLog2E + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (x - n * kLn2High) - n * kLn2Low;
  // 2 exp(r), which is between 1.4 and 2.9. Multiplied by 2^(n - 1), which is a normal number for all n.
  Vector p;
  if constexpr (kDouble) {
    p = r * Real(2.0 / 6227020800.0) + Real(2.0 / 479001600.0);
    p = p * r + Real(2.0 / 39916800.0);
    p = p * r + Real(2.0 / 3628800.0);
    p = p * r + Real(2.0 / 362880.0);
    p = p * r + Real(2.0 / 40320.0);
    p = p * r + Real(2.0 / 5040.0);
    p = p * r + Real(2.0 / 720.0);
    p = p * r + Real(2.0 / 120.0);
    p = p * r + Real(2.0 / 24.0);
    p = p * r + Real(2.0 / 6.0);
    p = p * r + Real(1.0);
  } else {
    p = r * Real(2 * 1.9875691500e-4) + Real(2 * 1.3981999507e-3);
    p = p * r + Real(2 * 8.3334519073e-3);
    p = p * r + Real(2 * 4.1665795894e-2);
    p = p * r + Real(2 * 1.6666665459e-1);
    p = p * r + Real(2 * 5.0000001201e-1);
  }
  p = p * r + Real(2);
  p = p * r + Real(2);
  const Vector power = (Vector)(((Integers)shifted + kExponentOfHalf) << kFractionBits);
  return x < kLowest ? Vector{} : p * power;
}

}  // namespace posenc::cpu
