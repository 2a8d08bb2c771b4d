#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

// How many samples a measurement takes, and their statistics.
namespace posenc::bench {

/// Seconds on a clock that never goes backwards.
inline double now() {
  using Seconds = std::chrono::duration<double>;
  return std::chrono::duration_cast<Seconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Median; for an even number of values, the mean of the two middle ones. `values` must not be empty.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

/// The part of a training step that is timed.
enum class Pass { forward, backward, total };

/// Statistics of the samples, in seconds.
struct Timing {
  double median;
  double minimum;
  int64_t samples;
  /// Peak memory in bytes, without the inputs; nullopt if it was not measured. For a backward pass it includes the
  /// forward pass.
  std::optional<int64_t> peak_bytes = std::nullopt;
  /// cuDNN plans that were built in all runs, discarded ones included; nullopt if they were not counted.
  std::optional<int64_t> plans = std::nullopt;
};

/// How often a measurement is repeated.
struct Sampling {
  /// Discarded runs: the first ones load kernels, start threads and fill the caching allocator.
  int64_t warm_ups = 3;
  /// Minimum number of samples: enough that a few disturbed ones do not change the median.
  int64_t at_least = 11;
  /// Maximum number of samples: more do not change the median of an undisturbed measurement.
  int64_t at_most = 51;
  /// Seconds after which no sample beyond `at_least` is started, so that a full run takes about a minute.
  double budget = 0.25;
};

/// Calls `sample`, which returns one measured time in seconds, as often as `sampling` says.
inline Timing measure(const std::function<double()>& sample, const Sampling& sampling = {}) {
  for (int64_t i = 0; i < sampling.warm_ups; ++i) {
    sample();
  }
  std::vector<double> seconds;
  const double end = now() + sampling.budget;
  for (int64_t i = 0; i < sampling.at_least || (i < sampling.at_most && now() < end); ++i) {
    seconds.push_back(sample());
  }
  return {median(seconds), *std::min_element(seconds.begin(), seconds.end()), static_cast<int64_t>(seconds.size())};
}

}  // namespace posenc::bench
