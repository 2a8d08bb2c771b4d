#pragma once

#include <arguments/rotary_frequencies.h>
#include <ops/dispatch.h>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <tuple>

// `rotary_tables` and its backward below the public function.
namespace posenc {

using arguments::FrequenciesArguments;
using arguments::FrequenciesBackwardArguments;

// Calls through the dispatcher.
namespace dispatch {

/// `posenc::rotary_tables`.
inline std::tuple<at::Tensor, at::Tensor> rotary_tables(const FrequenciesArguments<c10::SymInt>& arguments) {
  return call_operator<&rotary_tables>("posenc::rotary_tables", arguments);
}

/// The gradient of `rotary_tables` with respect to `inv_freq`:
///
///     dinv_freq_i = sum over p of p (cos dsin - sin dcos) of row p and pair i,
///
/// where `cos` and `sin` are the tables, which contain the attention factor. Summed in float64; deterministic.
///
/// @param grad_cos,grad_sin,cos,sin  `[P, R/2]`, float32 or float64, any strides.
/// @param dtype  of the result, that of `inv_freq`: float32 or float64.
/// @return `[R/2]`.
inline at::Tensor rotary_tables_backward(const FrequenciesBackwardArguments& arguments) {
  return call_operator<&rotary_tables_backward>("posenc::rotary_tables_backward", arguments);
}

}  // namespace dispatch
}  // namespace posenc
