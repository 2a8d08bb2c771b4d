#pragma once

#include <arguments/rotary_frequencies_problem.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

// Arguments of `rotary_tables` and its backward and their checks.
namespace posenc::arguments {

/// The arguments of `rotary_tables`. `Int` is int64_t, or c10::SymInt where a graph with dynamic shapes may be traced.
template <typename Int>
struct FrequenciesArguments {
  const at::Tensor& inv_freq;
  Int length;
  at::ScalarType dtype;
  double attention_factor;

  auto flat() const { return std::tie(inv_freq, length, dtype, attention_factor); }
};

/// Checks all arguments.
/// @throws c10::Error  naming the argument, what was expected and what was given.
void check_frequencies(const FrequenciesArguments<int64_t>& arguments);

/// A checked call of `rotary_tables` and its outputs.
struct FrequenciesCall {
  FrequenciesProblem problem;
  at::Tensor cos, sin;
};

FrequenciesCall frequencies_call(const FrequenciesArguments<int64_t>& arguments);

/// The arguments of `rotary_tables_backward`.
struct FrequenciesBackwardArguments {
  const at::Tensor& grad_cos;
  const at::Tensor& grad_sin;
  const at::Tensor& cos;
  const at::Tensor& sin;
  at::ScalarType dtype;  // dtype of `inv_freq`, and of the result

  auto flat() const { return std::tie(grad_cos, grad_sin, cos, sin, dtype); }
};

/// Checks all arguments.
/// @throws c10::Error  naming the argument, what was expected and what was given.
void check_frequencies_backward(const FrequenciesBackwardArguments& arguments);

/// Checks all arguments and describes the call.
FrequenciesBackwardProblem frequencies_backward_problem(const FrequenciesBackwardArguments& arguments);

}  // namespace posenc::arguments
