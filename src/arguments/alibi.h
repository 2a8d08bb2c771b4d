#pragma once

#include <arguments/alibi_problem.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

// Arguments of the ALiBi operators and their checks. Every implementation calls the checks before it launches anything,
// so the message for a bad argument is the same for calls of the free function, from Python and in a backward pass.
namespace posenc::arguments {

// The arguments of each operator, in the order of its schema. They refer to the tensors of the call. `Int` is int64_t,
// or c10::SymInt where a graph with dynamic shapes may be traced.

template <typename Int>
struct AlibiBiasArguments {
  const at::Tensor& slopes;
  Int q_len, k_len;
  bool causal;
  at::ScalarType dtype;
  std::optional<Int> query_offset;

  auto flat() const { return std::tie(slopes, q_len, k_len, causal, dtype, query_offset); }
};

/// For `alibi_add` and `alibi_add_`, which overwrites the scores.
template <typename Int>
struct AlibiAddArguments {
  const at::Tensor& scores;
  const at::Tensor& slopes;
  bool causal;
  std::optional<Int> query_offset;

  auto flat() const { return std::tie(scores, slopes, causal, query_offset); }
};

template <typename Int>
struct AlibiMaskArguments {
  const at::Tensor& grad;
  std::optional<Int> query_offset;

  auto flat() const { return std::tie(grad, query_offset); }
};

template <typename Int>
struct AlibiSlopesBackwardArguments {
  const at::Tensor& grad;
  bool causal;
  std::optional<Int> query_offset;

  auto flat() const { return std::tie(grad, causal, query_offset); }
};

template <typename Int>
struct AlibiSoftmaxArguments {
  const at::Tensor& scores;
  const at::Tensor& slopes;
  double scale;
  bool causal;
  const std::optional<at::Tensor>& key_padding_mask;
  std::optional<Int> query_offset;

  auto flat() const { return std::tie(scores, slopes, scale, causal, key_padding_mask, query_offset); }
};

template <typename Int>
struct AlibiSoftmaxBackwardArguments {
  const at::Tensor& grad;
  const at::Tensor& probs;
  double scale;
  bool causal;
  std::optional<Int> query_offset;
  bool slopes_grad;  // whether the gradient of the slopes is computed

  auto flat() const { return std::tie(grad, probs, scale, causal, query_offset, slopes_grad); }
};

/// Arguments of `alibi_shape` beside the sizes.
struct AlibiOptions {
  const char* op;
  bool causal;
  std::optional<int64_t> query_offset;
};

/// The dtype of sums, of lse and of gradients of slopes for tensors of `dtype`: float64 for float64, else float32.
at::ScalarType alibi_slopes_dtype(at::ScalarType dtype);

/// Checks a tensor of the shape of scores; `name` is its name in the schema.
/// @throws c10::Error  naming the argument, what was expected and what was given. The functions below throw the same.
AlibiShape alibi_shape(const AlibiOptions& options, const char* name, const at::Tensor& scores);

/// The same for sizes without a tensor. Checks that positions, distances and `batch * num_heads` are below 2^31.
AlibiShape alibi_shape(const AlibiOptions& options, int64_t batch, int64_t num_heads, int64_t q_len, int64_t k_len);

/// Checks slopes that belong to a tensor of `dtype` on `device`, whose name in messages is `beside`.
SlopesView alibi_slopes_view(
    const char* op,
    const at::Tensor& slopes,
    int64_t num_heads,
    at::ScalarType dtype,
    c10::Device device,
    const char* beside = "scores");

// Each function checks all arguments and describes the call. The `allocate` functions below enter the outputs.
AlibiAddProblem alibi_bias_problem(const AlibiBiasArguments<int64_t>& arguments);
AlibiAddProblem alibi_add_problem(const AlibiAddArguments<int64_t>& arguments);
AlibiAddProblem alibi_add_in_place_problem(const AlibiAddArguments<int64_t>& arguments);
AlibiAddProblem alibi_mask_problem(const AlibiMaskArguments<int64_t>& arguments);
AlibiShape alibi_slopes_backward_shape(const AlibiSlopesBackwardArguments<int64_t>& arguments);
AlibiSoftmaxProblem alibi_softmax_problem(const AlibiSoftmaxArguments<int64_t>& arguments);
AlibiSoftmaxBackwardProblem alibi_softmax_backward_problem(const AlibiSoftmaxBackwardArguments<int64_t>& arguments);

/// Describes a tensor that is read as `[B, H, Sq, Sk]`.
ScoresIn scores_in(const at::Tensor& tensor);

/// Allocates the output for `input`, in its memory layout if that is dense, and enters it into `out`.
at::Tensor allocate_output(const at::Tensor& input, ScoresOut& out);

/// Allocates the bias of `slopes` and enters it into `problem`.
at::Tensor allocate_bias(const at::Tensor& slopes, at::ScalarType dtype, AlibiAddProblem& problem);

/// The gradient of slopes, and the row sums that it is computed from.
struct AlibiSlopesGradient {
  at::Tensor result, row_sums;
};

/// Allocates the gradient of slopes and its row sums and enters them into `problem`.
AlibiSlopesGradient allocate_slopes_gradient(const at::Tensor& probs, AlibiSoftmaxBackwardProblem& problem);

/// A kernel of one dispatch key. It fills the output of `problem`, whose dtype and device are those of `like`.
template <typename Problem>
using AlibiKernel = void (*)(const Problem& problem, const at::Tensor& like);

// The operators for one dispatch key. Each checks its arguments, allocates its outputs and runs the kernel.

template <AlibiKernel<AlibiAddProblem> kKernel>
at::Tensor alibi_bias(const AlibiBiasArguments<int64_t>& arguments) {
  AlibiAddProblem problem = alibi_bias_problem(arguments);
  at::Tensor output = allocate_bias(arguments.slopes, arguments.dtype, problem);
  kKernel(problem, output);
  return output;
}

template <AlibiKernel<AlibiAddProblem> kKernel>
at::Tensor alibi_add(const AlibiAddArguments<int64_t>& arguments) {
  AlibiAddProblem problem = alibi_add_problem(arguments);
  at::Tensor output = allocate_output(arguments.scores, problem.out);
  kKernel(problem, arguments.scores);
  return output;
}

template <AlibiKernel<AlibiAddProblem> kKernel>
void alibi_add_in_place(const AlibiAddArguments<int64_t>& arguments) {
  kKernel(alibi_add_in_place_problem(arguments), arguments.scores);
}

template <AlibiKernel<AlibiAddProblem> kKernel>
at::Tensor alibi_mask(const AlibiMaskArguments<int64_t>& arguments) {
  AlibiAddProblem problem = alibi_mask_problem(arguments);
  at::Tensor output = allocate_output(arguments.grad, problem.out);
  kKernel(problem, arguments.grad);
  return output;
}

template <AlibiKernel<AlibiSoftmaxProblem> kKernel>
at::Tensor alibi_softmax(const AlibiSoftmaxArguments<int64_t>& arguments) {
  AlibiSoftmaxProblem problem = alibi_softmax_problem(arguments);
  at::Tensor output = allocate_output(arguments.scores, problem.out);
  kKernel(problem, arguments.scores);
  return output;
}

template <AlibiKernel<AlibiSoftmaxBackwardProblem> kKernel>
std::tuple<at::Tensor, at::Tensor> alibi_softmax_backward(const AlibiSoftmaxBackwardArguments<int64_t>& arguments) {
  AlibiSoftmaxBackwardProblem problem = alibi_softmax_backward_problem(arguments);
  at::Tensor output = allocate_output(arguments.probs, problem.out);
  AlibiSlopesGradient slopes;
  if (arguments.slopes_grad) {
    slopes = allocate_slopes_gradient(arguments.probs, problem);
  }
  kKernel(problem, arguments.probs);
  return {std::move(output), std::move(slopes.result)};
}

}  // namespace posenc::arguments
