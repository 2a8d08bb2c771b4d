#pragma once

#include <contract/rotary_problem.h>

#include <ATen/core/Tensor.h>

#include <optional>

// What the operators of the rotary family accept. Every implementation passes through here before it launches
// anything, so a bad argument meets the same message whether the call came from the free function, from Python
// or from a backward pass.
namespace posenc::contract {

/// A tensor to rotate and the name it has in the schema.
struct Rotated {
  const char* name;
  const at::Tensor& tensor;
};

/// The remaining arguments of `rotary_embedding` and `rotary_embedding_qk`.
struct RotaryArguments {
  const char* op;
  const at::Tensor& cos;
  const at::Tensor& sin;
  const std::optional<at::Tensor>& positions;
  bool interleaved;
  bool conjugate;
};

/// Checks all arguments and describes the call; the outputs are still missing. `k` is null for one tensor.
/// @throws c10::Error  naming the argument, what was expected and what came.
RotaryProblem rotary_problem(const RotaryArguments& arguments, const Rotated& q, const Rotated* k = nullptr);

/// The checks of `rotary_problem` for tensors without data or with symbolic sizes.
void check_rotary(const RotaryArguments& arguments, const Rotated& q, const Rotated* k = nullptr);

/// Allocates the output that goes with `input`, in its memory layout where that is dense, and enters it into
/// `operand`.
at::Tensor allocate_output(const at::Tensor& input, RotaryProblem::Operand& operand);

/// B and S of a tensor `[B, S, H, D]` or `[T, H, D]`, and its strides as the former.
int64_t batch_of(const at::Tensor& tensor);
int64_t seq_len_of(const at::Tensor& tensor);
Strides strides_of(const at::Tensor& tensor);

}  // namespace posenc::contract
