#pragma once

#include <contract/rotary_backward_problem.h>
#include <contract/rotary_embedding_tables_backward.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace posenc::contract {

/// The arguments of `rotary_embedding_backward` where positions have one axis.
struct RotaryBackwardArguments {
  at::TensorList grads;
  at::TensorList inputs;
  const at::Tensor& cos;
  const at::Tensor& sin;
  const std::optional<at::Tensor>& positions;
  bool interleaved;
  bool conjugate;
};

/// A checked call, with everything that its kernel needs and what keeps that alive.
struct RotaryBackwardCall {
  RotaryBackwardProblem problem;
  std::vector<at::Tensor> input_grads;
  RotaryTablesCall tables;
};

/// Checks all arguments, sorts tokens by the row they read (on the device, without waiting for it) and allocates the
/// outputs.
/// @throws c10::Error  naming the argument, what was expected and what came.
RotaryBackwardCall rotary_backward_call(const RotaryBackwardArguments& arguments);

}  // namespace posenc::contract
