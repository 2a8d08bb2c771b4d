#pragma once

#include <contract/rotary_problem.h>
#include <ops/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <vector>

// What `rotary_embedding_tables_backward` and `rotary_embedding_backward` accept.
namespace posenc::contract {

/// A checked call, with everything that its kernel needs and what keeps that alive.
struct RotaryTablesCall {
  RotaryTablesProblem problem;
  at::Tensor grad_cos, grad_sin;
  at::Tensor order, row_starts;  // undefined without positions
};

/// Checks the arguments of `rotary_embedding_tables_backward`, sorts tokens by the row they read (on the device, without
/// waiting for it) and allocates the outputs.
/// @throws c10::Error  naming the argument, what was expected and what came.
RotaryTablesCall rotary_tables_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs);

/// The same of `rotary_embedding_backward`, where positions have one axis.
struct RotaryBackwardCall {
  RotaryBackwardProblem problem;
  std::vector<at::Tensor> input_grads;
  RotaryTablesCall tables;
};
RotaryBackwardCall rotary_backward_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs);

}  // namespace posenc::contract
