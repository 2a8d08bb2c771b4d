#pragma once

#include <contract/alibi_problem.h>

#include <ATen/core/Tensor.h>

#include <optional>

// What the operators of the ALiBi family accept. Every implementation passes through here before it launches
// anything, so a bad argument meets the same message whether the call came from the free function, from Python
// or from a backward pass.
namespace posenc::contract {

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

}  // namespace posenc::contract
