#pragma once

#include <cstdint>

// Arguments of the kernels of `rotary_tables` and its backward. No torch.
namespace posenc {

/// A table `[length, num_pairs]` of any strides.
struct TableView {
  const void* data;
  int64_t stride_row, stride_pair;
};

/// One call of `rotary_tables`.
struct FrequenciesProblem {
  const void* inv_freq;  // float32 or float64, [num_pairs]
  int64_t inv_freq_stride;
  int64_t length, num_pairs;
  double attention_factor;
  void* cos;  // [length, num_pairs], contiguous; so is sin
  void* sin;
};

/// One call of `rotary_tables_backward`. All tables have one dtype.
struct FrequenciesBackwardProblem {
  TableView grad_cos, grad_sin, cos, sin;
  int64_t length, num_pairs;
};

}  // namespace posenc
