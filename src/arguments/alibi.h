#pragma once

#include <arguments/alibi_problem.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

// What the operators of the ALiBi family accept. Every implementation passes through here before it launches
// anything, so a bad argument meets the same message whether the call came from the free function, from Python
// or from a backward pass.
namespace posenc::arguments {

/// What all of the family take besides tensors.
struct AlibiArguments {
  const char* op;
  bool causal;
  std::optional<int64_t> query_offset;
};

/// The dtype in which gradients of slopes are returned for gradients of `dtype`.
at::ScalarType alibi_slopes_dtype(at::ScalarType dtype);

/// Checks a tensor of the shape of scores, called `name` in the schema.
/// @throws c10::Error  naming the argument, what was expected and what came; as all functions here.
AlibiShape alibi_shape(const AlibiArguments& arguments, const char* name, const at::Tensor& scores);

/// The same of sizes alone: that all distances are below 2^31.
AlibiShape alibi_shape(const AlibiArguments& arguments, int64_t batch, int64_t num_heads, int64_t q_len, int64_t k_len);

/// Checks the slopes of scores of `dtype`, or of another tensor that has a device and is called `beside`.
SlopesView alibi_slopes_view(
    const char* op,
    const at::Tensor& slopes,
    int64_t num_heads,
    at::ScalarType dtype,
    c10::Device device,
    const char* beside = "scores");

/// The whole call of each operator; where an output is missing, it is for `allocate_output` to enter.
AlibiAddProblem alibi_bias_problem(
    const AlibiArguments& arguments,
    const at::Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    at::ScalarType dtype);
AlibiAddProblem alibi_add_problem(const AlibiArguments& arguments, const at::Tensor& scores, const at::Tensor& slopes);
AlibiAddProblem alibi_add_in_place_problem(
    const AlibiArguments& arguments,
    at::Tensor& scores,
    const at::Tensor& slopes);
AlibiAddProblem alibi_mask_problem(const AlibiArguments& arguments, const at::Tensor& grad);
AlibiSoftmaxProblem alibi_softmax_problem(
    const AlibiArguments& arguments,
    const at::Tensor& scores,
    const at::Tensor& slopes,
    double scale,
    const std::optional<at::Tensor>& key_padding_mask);
AlibiSoftmaxBackwardProblem alibi_softmax_backward_problem(
    const AlibiArguments& arguments,
    const at::Tensor& grad,
    const at::Tensor& probs,
    double scale);

/// A tensor to read, as `[B, H, Sq, Sk]`.
ScoresIn scores_in(const at::Tensor& tensor);

/// Allocates the output that goes with `input`, in its memory layout where that is dense, and enters it into `out`.
at::Tensor allocate_output(const at::Tensor& input, ScoresOut& out);

/// Allocates the bias of `slopes` and enters it into `problem`.
at::Tensor allocate_bias(const at::Tensor& slopes, at::ScalarType dtype, AlibiAddProblem& problem);

/// The gradient of slopes, and the sums of rows that it is made from.
struct AlibiSlopesGradient {
  at::Tensor result, row_sums;
};

/// Allocates what the gradient of slopes needs and enters it into `problem`.
AlibiSlopesGradient allocate_slopes_gradient(const at::Tensor& probs, AlibiSoftmaxBackwardProblem& problem);

/// A kernel of one dispatch key. It fills the output of `problem`, whose dtype and device are those of `like`.
template <typename Problem>
using AlibiKernel = void (*)(const Problem& problem, const at::Tensor& like);

// The operators for a dispatch key: checks, outputs, kernel.

template <AlibiKernel<AlibiAddProblem> kKernel>
at::Tensor alibi_bias(
    const at::Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<int64_t> query_offset) {
  AlibiAddProblem problem =
      alibi_bias_problem({"posenc::alibi_bias", causal, query_offset}, slopes, q_len, k_len, dtype);
  at::Tensor output = allocate_bias(slopes, dtype, problem);
  kKernel(problem, output);
  return output;
}

template <AlibiKernel<AlibiAddProblem> kKernel>
at::Tensor alibi_add(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    bool causal,
    std::optional<int64_t> query_offset) {
  AlibiAddProblem problem = alibi_add_problem({"posenc::alibi_add", causal, query_offset}, scores, slopes);
  at::Tensor output = allocate_output(scores, problem.out);
  kKernel(problem, scores);
  return output;
}

template <AlibiKernel<AlibiAddProblem> kKernel>
void alibi_add_(at::Tensor& scores, const at::Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  kKernel(alibi_add_in_place_problem({"posenc::alibi_add_", causal, query_offset}, scores, slopes), scores);
}

template <AlibiKernel<AlibiAddProblem> kKernel>
at::Tensor alibi_mask(const at::Tensor& grad, std::optional<int64_t> query_offset) {
  AlibiAddProblem problem = alibi_mask_problem({"posenc::alibi_mask", /*causal=*/true, query_offset}, grad);
  at::Tensor output = allocate_output(grad, problem.out);
  kKernel(problem, grad);
  return output;
}

template <AlibiKernel<AlibiSoftmaxProblem> kKernel>
at::Tensor alibi_softmax(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<at::Tensor>& key_padding_mask,
    std::optional<int64_t> query_offset) {
  AlibiSoftmaxProblem problem =
      alibi_softmax_problem({"posenc::alibi_softmax", causal, query_offset}, scores, slopes, scale, key_padding_mask);
  at::Tensor output = allocate_output(scores, problem.out);
  kKernel(problem, scores);
  return output;
}

template <AlibiKernel<AlibiSoftmaxBackwardProblem> kKernel>
std::tuple<at::Tensor, at::Tensor> alibi_softmax_backward(
    const at::Tensor& grad,
    const at::Tensor& probs,
    double scale,
    bool causal,
    std::optional<int64_t> query_offset,
    bool slopes_grad) {
  AlibiSoftmaxBackwardProblem problem =
      alibi_softmax_backward_problem({"posenc::alibi_softmax_backward", causal, query_offset}, grad, probs, scale);
  at::Tensor output = allocate_output(probs, problem.out);
  AlibiSlopesGradient slopes;
  if (slopes_grad) {
    slopes = allocate_slopes_gradient(probs, problem);
  }
  kKernel(problem, probs);
  return {std::move(output), std::move(slopes.result)};
}

}  // namespace posenc::arguments
