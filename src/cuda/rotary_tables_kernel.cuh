#pragma once

#include <arguments/rotary_frequencies_problem.h>
#include <cuda/detail/launch.h>

// Cosines and sines of position times frequency. Threads along x are pairs, along y positions. Angle, sine and cosine
// are computed in float64 (a float32 angle has an error of 0.03 at position 1,000,000) and rounded once.
namespace posenc::cuda {

/// @tparam Freq,Real  the dtypes of the frequencies and of the tables.
template <typename Freq, typename Real>
__global__ void __launch_bounds__(kMaxThreads)
    rotary_tables_kernel(const __grid_constant__ FrequenciesProblem problem) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t pair = int64_t{blockIdx.y} * blockDim.x + threadIdx.x;
  if (row >= problem.length || pair >= problem.num_pairs) {
    return;
  }
  const Freq inv_freq = static_cast<const Freq*>(problem.inv_freq)[pair * problem.inv_freq_stride];
  double sin = 0;
  double cos = 0;
  sincos(static_cast<double>(row) * static_cast<double>(inv_freq), &sin, &cos);
  const int64_t index = row * problem.num_pairs + pair;
  static_cast<Real*>(problem.cos)[index] = static_cast<Real>(problem.attention_factor * cos);
  static_cast<Real*>(problem.sin)[index] = static_cast<Real>(problem.attention_factor * sin);
}

}  // namespace posenc::cuda
