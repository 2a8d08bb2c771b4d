#pragma once

#include <arguments/rotary_frequencies_problem.h>

#include <ATen/core/Tensor.h>

// What `rotary_tables` and its backward accept.
namespace posenc::arguments {

/// @throws c10::Error  naming the argument, what was expected and what came.
void check_frequencies(const at::Tensor& inv_freq, int64_t length, at::ScalarType dtype, double attention_factor);

/// A checked call of `rotary_tables` and its outputs.
struct FrequenciesCall {
  FrequenciesProblem problem;
  at::Tensor cos, sin;
};

FrequenciesCall frequencies_call(
    const at::Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor);

/// The arguments of `rotary_tables_backward`.
struct FrequenciesBackwardArguments {
  const at::Tensor& grad_cos;
  const at::Tensor& grad_sin;
  const at::Tensor& cos;
  const at::Tensor& sin;
  at::ScalarType dtype;
};

/// @throws c10::Error  naming the argument, what was expected and what came.
void check_frequencies_backward(const FrequenciesBackwardArguments& arguments);

/// Checks all arguments and describes the call.
FrequenciesBackwardProblem frequencies_backward_problem(const FrequenciesBackwardArguments& arguments);

}  // namespace posenc::arguments
