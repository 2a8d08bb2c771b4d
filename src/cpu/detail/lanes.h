#pragma once

#include <algorithm>
#include <cstdint>

// How loops are divided, over threads and over the lanes of vectors.
namespace posenc::cpu {

/// Elements that make it worth handing work to another thread: some ten microseconds of it.
constexpr int64_t kGrainElements = 32768;

/// Numbers added side by side, so that the compiler can vectorise a sum or a maximum and its order stays one for all
/// instruction sets.
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
