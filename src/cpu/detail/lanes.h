#pragma once

#include <algorithm>
#include <cstdint>

// Division of loops over threads and over the lanes of vectors.
namespace posenc::cpu {

/// Grain size of `at::parallel_for` in elements, about ten microseconds of work.
constexpr int64_t kGrainElements = 32768;

/// Partial results that are computed side by side. The compiler can vectorise the reduction, and its order is the same
/// for all instruction sets.
template <typename T, int N>
struct Lanes {
  T values[N];

  explicit Lanes(T initial) { std::fill_n(values, N, initial); }

  T sum() const {
    T total = 0;
    for (int i = 0; i < N; ++i) {
      total += values[i];
    }
    return total;
  }
};

}  // namespace posenc::cpu
