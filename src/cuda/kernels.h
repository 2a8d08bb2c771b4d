#pragma once

#include <arguments/alibi_problem.h>
#include <arguments/qk_norm_rotary_problem.h>
#include <arguments/rotary_problem.h>
#include <ops/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

// What each .cu file here defines; library.cpp registers it. nvcc reads its sources several times, so none of them
// includes <torch/library.h>, which takes it 10 of 18 s.
namespace posenc::cuda {

// Each fills the outputs of its problem, whose dtype and device are those of `like`.
void rotate(const RotaryProblem& problem, const at::Tensor& like);
void qk_norm_rotate(const QKNormRotaryProblem& problem, const at::Tensor& like);
void qk_norm_rotate_backward(const QKNormRotaryBackwardProblem& problem, const at::Tensor& like);
void alibi_bias(const AlibiAddProblem& problem, const at::Tensor& like);
void alibi_add(const AlibiAddProblem& problem, const at::Tensor& like);
void alibi_mask(const AlibiAddProblem& problem, const at::Tensor& like);
void alibi_softmax(const AlibiSoftmaxProblem& problem, const at::Tensor& like);
void alibi_softmax_backward(const AlibiSoftmaxBackwardProblem& problem, const at::Tensor& like);

// Whole operators.
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> rotary_embedding_backward(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs);
std::tuple<at::Tensor, at::Tensor> rotary_embedding_tables_backward(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs);
std::tuple<at::Tensor, at::Tensor> rotary_tables(
    const at::Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor);
at::Tensor rotary_tables_backward(
    const at::Tensor& grad_cos,
    const at::Tensor& grad_sin,
    const at::Tensor& cos,
    const at::Tensor& sin,
    at::ScalarType dtype);
at::Tensor alibi_slopes_backward(const at::Tensor& grad, bool causal, std::optional<int64_t> query_offset);

}  // namespace posenc::cuda
