#pragma once

#include <contract/rotary_problem.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace posenc::contract {

/// The arguments of `rotary_embedding_tables_backward`, and of others that sum as it does.
struct RotaryTablesArguments {
  const char* op;
  at::TensorList grads;
  at::TensorList inputs;
  const at::Tensor& table;
  const std::optional<at::Tensor>& positions;
  bool interleaved;
  bool conjugate;
  at::IntArrayRef pair_axes;
};

/// @throws c10::Error  naming the argument, what was expected and what came.
void check_rotary_tables(const RotaryTablesArguments& arguments);

/// A checked call, with everything that its kernel needs and what keeps that alive.
struct RotaryTablesCall {
  RotaryTablesProblem problem;
  at::Tensor grad_cos, grad_sin;
  at::Tensor order, row_starts;  // undefined without positions
};

/// Checks all arguments, sorts tokens by the row they read (on the device, without waiting for it) and
/// allocates the outputs.
RotaryTablesCall rotary_tables_call(const RotaryTablesArguments& arguments);

}  // namespace posenc::contract
