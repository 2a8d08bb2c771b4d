#pragma once

#include <contract/rotary_problem.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

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
  at::IntArrayRef pair_axes;
};

/// Checks all arguments and describes the call; the outputs are still missing. `k` is null for one tensor.
/// @throws c10::Error  naming the argument, what was expected and what came.
RotaryProblem rotary_problem(const RotaryArguments& arguments, const Rotated& q, const Rotated* k = nullptr);

/// The checks of `rotary_problem` for tensors without data or with symbolic sizes.
void check_rotary(const RotaryArguments& arguments, const Rotated& q, const Rotated* k = nullptr);

/// The checks of `rotary_in_place_problem`, likewise.
void check_rotary_in_place(const RotaryArguments& arguments, const Rotated& q, const Rotated* k = nullptr);

/// Allocates the output that goes with `input`, in its memory layout where that is dense, and enters it into
/// `operand`.
at::Tensor allocate_output(const at::Tensor& input, RotaryProblem::Operand& operand);

/// `rotary_problem` of tensors that are overwritten; the outputs are entered.
/// @throws c10::Error  also where memory overlaps: within a tensor, between two, or with tables or positions.
RotaryProblem rotary_in_place_problem(const RotaryArguments& arguments, const Rotated& q, const Rotated* k = nullptr);

/// An operand that is read from `input`, and the output of one.
RotaryProblem::Operand operand_of(const at::Tensor& input);
void set_output(const at::Tensor& output, RotaryProblem::Operand& operand);

/// The packed form of `pair_axes`, which have been checked; zeros where there are none.
PairAxes packed_pair_axes(at::IntArrayRef pair_axes);

/// B and S of a tensor `[B, S, H, D]` or `[T, H, D]`, and its strides as the former.
int64_t batch_of(const at::Tensor& tensor);
int64_t seq_len_of(const at::Tensor& tensor);
Strides strides_of(const at::Tensor& tensor);

/// A kernel of one dispatch key. It fills the outputs of `problem`, whose dtype and device are those of `like`.
using RotaryKernel = void (*)(const RotaryProblem& problem, const at::Tensor& like);

/// `rotary_embedding` for a dispatch key: checks, outputs, kernel.
template <RotaryKernel kKernel>
at::Tensor rotary_embedding(
    const at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  RotaryProblem problem =
      rotary_problem({"posenc::rotary_embedding", cos, sin, positions, interleaved, conjugate, pair_axes}, {"x", x});
  at::Tensor output = allocate_output(x, problem.operands[0]);
  kKernel(problem, x);
  return output;
}

/// `rotary_embedding_qk` likewise.
template <RotaryKernel kKernel>
std::tuple<at::Tensor, at::Tensor> rotary_embedding_qk(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const Rotated second{"k", k};
  RotaryProblem problem = rotary_problem(
      {"posenc::rotary_embedding_qk", cos, sin, positions, interleaved, conjugate, pair_axes}, {"q", q}, &second);
  at::Tensor q_out = allocate_output(q, problem.operands[0]);
  at::Tensor k_out = allocate_output(k, problem.operands[1]);
  kKernel(problem, q);
  return {std::move(q_out), std::move(k_out)};
}

/// `rotary_embedding_` likewise. It returns nothing: what a schema returns beside what it changes, functionalisation
/// (torch.compile) takes for new memory.
template <RotaryKernel kKernel>
void rotary_embedding_in_place(
    at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  kKernel(
      rotary_in_place_problem(
          {"posenc::rotary_embedding_", cos, sin, positions, interleaved, conjugate, pair_axes}, {"x", x}),
      x);
}

/// `rotary_embedding_qk_` likewise.
template <RotaryKernel kKernel>
void rotary_embedding_qk_in_place(
    at::Tensor& q,
    at::Tensor& k,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const Rotated second{"k", k};
  kKernel(
      rotary_in_place_problem(
          {"posenc::rotary_embedding_qk_", cos, sin, positions, interleaved, conjugate, pair_axes}, {"q", q}, &second),
      q);
}

}  // namespace posenc::contract
