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

  /// The sum, by halves: in turn it would take the latency of N additions.
  T sum() const {
    static_assert((N & (N - 1)) == 0, "a power of two");
    T sums[N];
    std::copy_n(values, N, sums);
    for (int size = N / 2; size > 0; size /= 2) {
      for (int i = 0; i < size; ++i) {
        sums[i] += sums[i + size];
      }
    }
    return sums[0];
  }
};

}  // namespace posenc::cpu
