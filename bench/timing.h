#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

// Repetition and statistics: how many samples a measurement takes and what is made of them.
namespace posenc::bench {

/// Seconds on a clock that never goes backwards.
inline double now() {
  using Seconds = std::chrono::duration<double>;
  return std::chrono::duration_cast<Seconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Middle value, the mean of the two middle ones for an even number. `values` is not empty.
inline double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

/// What of a step is on the clock.
enum class Pass { forward, backward, total };

/// What was measured, in seconds.
struct Timing {
  double median;
  double minimum;
  int64_t samples;
  /// Most bytes held at one time beyond the inputs, where that was asked for and can be told; of a backward pass with
  /// the forward pass before it.
  std::optional<int64_t> peak_bytes = std::nullopt;
};

/// How often a measurement is repeated.
struct Sampling {
  /// Runs that are thrown away: the first ones load kernels, start threads and fill the caching allocator.
  int64_t warm_ups = 3;
  /// Fewest samples whose median shrugs off a few disturbed ones.
  int64_t at_least = 11;
  /// Beyond this the median of an undisturbed measurement no longer moves.
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
