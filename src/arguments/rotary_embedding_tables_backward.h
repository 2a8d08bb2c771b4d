#pragma once

#include <arguments/rotary_problem.h>
#include <ops/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <vector>

// What `rotary_embedding_tables_backward` and `rotary_embedding_backward` accept.
namespace posenc::arguments {

/// A checked call, with everything that its kernel needs and what keeps that alive.
struct RotaryTablesCall {
  RotaryTablesProblem problem;
  at::Tensor grad_cos, grad_sin;
  at::Tensor order, row_starts;  // undefined without positions
};

/// Checks the arguments of `rotary_embedding_tables_backward` and allocates dcos and dsin. Where positions choose the
/// rows of the tables, sorts the tokens by row on the device of the tensors; the host does not wait for it.
/// @throws c10::Error  where an argument is wrong, before anything is launched.
RotaryTablesCall rotary_tables_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs);

/// A checked call of `rotary_embedding_backward`, where positions have one axis.
struct RotaryBackwardCall {
  RotaryBackwardProblem problem;
  std::vector<at::Tensor> input_grads;
  RotaryTablesCall tables;
};
RotaryBackwardCall rotary_backward_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs);

}  // namespace posenc::arguments
