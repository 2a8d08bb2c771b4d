#pragma once

#include <arguments/rotary_problem.h>
#include <arguments/tensor.h>
#include <ops/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <tuple>
#include <utility>

// Checks of the rotary operators. Every implementation calls them before it launches anything, so the message for a bad
// argument is the same for calls of the free function, from Python and in a backward pass.
namespace posenc::arguments {

/// The tensors to rotate: one, or q and k.
using RotatedList = at::ArrayRef<NamedTensor>;

/// Checks shapes, dtypes and devices of all arguments of the operator `op`, such as "posenc::rotary_embedding".
/// @throws c10::Error  at the first argument that is wrong: its name, what was expected and what was given.
void check_rotary(const char* op, const Rotation& rotation, RotatedList inputs);

/// `check_rotary` for inputs that are overwritten.
/// @throws c10::Error  as `check_rotary`, and if the memory of an input overlaps itself, the other input, a table or
///   the positions.
void check_rotary_in_place(const char* op, const Rotation& rotation, RotatedList inputs);

/// Describes a call whose arguments have been checked, without its outputs.
/// @throws c10::Error  if `position_check()` is on and a position is outside the tables, or the tables have a column
///   for each channel.
RotaryProblem describe_rotary(const char* op, const Rotation& rotation, RotatedList inputs);

/// `check_rotary`, then `describe_rotary`.
RotaryProblem rotary_problem(const char* op, const Rotation& rotation, RotatedList inputs);

/// `check_rotary_in_place`, then `describe_rotary` with the inputs as outputs.
RotaryProblem rotary_in_place_problem(const char* op, const Rotation& rotation, RotatedList inputs);

/// Allocates the output for `input`, in its memory layout if that is dense, and enters it into `operand`.
at::Tensor allocate_output(const at::Tensor& input, RotaryProblem::Operand& operand);

/// Describes `input` as an operand without output. `set_output` adds the output.
RotaryProblem::Operand operand_of(const at::Tensor& input);
void set_output(const at::Tensor& output, RotaryProblem::Operand& operand);

/// `pair_axes`, which have been checked, in packed form; all zeros if there are none.
PairAxes packed_pair_axes(at::IntArrayRef pair_axes);

/// B and S of a tensor `[B, S, H, D]` or `[T, H, D]`, and its strides as `[B, S, H, D]`.
int64_t batch_of(const at::Tensor& tensor);
int64_t seq_len_of(const at::Tensor& tensor);
Strides strides_of(const at::Tensor& tensor);

/// A kernel of one dispatch key. It fills the outputs of `problem`, whose dtype and device are those of `like`.
using RotaryKernel = void (*)(const RotaryProblem& problem, const at::Tensor& like);

// The operators for one dispatch key. Each checks its arguments, allocates its outputs and runs the kernel.

template <RotaryKernel kKernel>
at::Tensor rotary_embedding(const Rotation& rotation, const at::Tensor& x) {
  RotaryProblem problem = rotary_problem("posenc::rotary_embedding", rotation, {{"x", x}});
  at::Tensor output = allocate_output(x, problem.operands[0]);
  kKernel(problem, x);
  return output;
}

template <RotaryKernel kKernel>
std::tuple<at::Tensor, at::Tensor> rotary_embedding_qk(
    const Rotation& rotation,
    const at::Tensor& q,
    const at::Tensor& k) {
  RotaryProblem problem = rotary_problem("posenc::rotary_embedding_qk", rotation, {{"q", q}, {"k", k}});
  at::Tensor q_out = allocate_output(q, problem.operands[0]);
  at::Tensor k_out = allocate_output(k, problem.operands[1]);
  kKernel(problem, q);
  return {std::move(q_out), std::move(k_out)};
}

template <RotaryKernel kKernel>
void rotary_embedding_in_place(const Rotation& rotation, at::Tensor& x) {
  kKernel(rotary_in_place_problem("posenc::rotary_embedding_", rotation, {{"x", x}}), x);
}

template <RotaryKernel kKernel>
void rotary_embedding_qk_in_place(const Rotation& rotation, at::Tensor& q, at::Tensor& k) {
  kKernel(rotary_in_place_problem("posenc::rotary_embedding_qk_", rotation, {{"q", q}, {"k", k}}), q);
}

}  // namespace posenc::arguments
