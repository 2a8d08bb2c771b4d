#pragma once

#include <cpu/detail/simd.h>

#include <type_traits>

namespace posenc::cpu {

/// `exp(x) = (2 + product * r) * half_power`, by Cody and Waite's reduction of x by ln 2 and a polynomial (Cephes' expf
/// in float32, Taylor's in float64).
template <typename S>
struct ExponentialParts {
  typename S::Vector r;           // x - n ln 2, between -0.35 and 0.35
  typename S::Vector product;     // 2 (exp(r) - 1) / r
  typename S::Vector half_power;  // 2^(n - 1), for x within the normal range
};

template <typename S>
POSENC_ALWAYS_INLINE ExponentialParts<S> exponential_parts(const typename S::Vector& x) {
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

  const Vector shifted = x * kLog2E + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (x - n * kLn2High) - n * kLn2Low;
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
  return {r, p, (Vector)(((Integers)shifted + kExponentOfHalf) << kFractionBits)};
}

/// exp(x) with an error of at most 2 units in the last place. Zero below -86.9 (float64: -708), close to the end of the
/// normal range, where LibTorch's exp takes ten times longer. Infinity above the range; NaN stays NaN.
template <typename S>
POSENC_ALWAYS_INLINE typename S::Vector exponential(const typename S::Vector& argument) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  constexpr bool kDouble = std::is_same_v<Real, double>;
  constexpr auto kLowest = static_cast<Real>(kDouble ? -708.0 : -86.9);
  constexpr auto kBeyond = static_cast<Real>(kDouble ? 710.0 : 89.0);  // its exponential is above the range
  const Vector x = kBeyond < argument ? S::all(kBeyond) : argument;
  const ExponentialParts<S> parts = exponential_parts<S>(x);
  return x < kLowest ? Vector{} : (parts.product * parts.r + Real(2)) * parts.half_power;
}

/// tanh(x) with an error of at most 4 units in the last place: `-m / (m + 2)` with `m = exp(-2 |x|) - 1`, which is
/// computed without cancellation. NaN stays NaN.
template <typename S>
POSENC_ALWAYS_INLINE typename S::Vector hyperbolic_tangent(const typename S::Vector& x) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  using Integers = typename S::Integers;
  constexpr auto kLowest = static_cast<Real>(-40);  // tanh(20) is 1
  const Vector magnitude = S::abs(x);
  const Vector argument = magnitude * Real(-2);
  const ExponentialParts<S> parts = exponential_parts<S>(argument < kLowest ? S::all(kLowest) : argument);
  const Vector m = parts.product * parts.r * parts.half_power + (parts.half_power * Real(2) - Real(1));
  const Vector result = S::abs(m / (m + Real(2)));
  return (Vector)((Integers)result | ((Integers)x ^ (Integers)magnitude));
}

}  // namespace posenc::cpu
