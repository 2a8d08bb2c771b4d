#pragma once

#include <arguments/rotary_problem.h>
#include <ops/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <vector>

// Checks of `rotary_embedding_tables_backward` and `rotary_embedding_backward`, and their kernels' problems.
namespace posenc::arguments {

/// A checked call: the problem of its kernel and the tensors that the problem points to.
struct RotaryTablesCall {
  RotaryTablesProblem problem;
  at::Tensor grad_cos, grad_sin;
  at::Tensor order, row_starts;  // undefined without positions
};

/// Checks the arguments of `rotary_embedding_tables_backward` and allocates dcos and dsin. With positions it sorts the
/// tokens by the row that they read, on the device of the tensors; the host does not wait.
/// @throws c10::Error  naming the argument, what was expected and what was given, before anything is launched.
RotaryTablesCall rotary_tables_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs);

/// A checked call of `rotary_embedding_backward` with positions of one axis.
struct RotaryBackwardCall {
  RotaryBackwardProblem problem;
  std::vector<at::Tensor> input_grads;
  RotaryTablesCall tables;
};
RotaryBackwardCall rotary_backward_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs);

}  // namespace posenc::arguments
