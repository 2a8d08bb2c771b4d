#pragma once

#include <arguments/alibi_problem.h>
#include <arguments/attention_problem.h>
#include <arguments/qk_norm_rotary_problem.h>
#include <arguments/rotary_frequencies_problem.h>
#include <arguments/rotary_problem.h>
#include <cuda/detail/host.h>

// The functions that the .cu files define. Each fills the outputs of its problem on the current device and stream;
// `dtype` is that of the tensors, unless it says otherwise. No torch (detail/host.h says why); library.cpp makes
// operators of them.
namespace posenc::cuda {

void rotate(const RotaryProblem& problem, DType dtype);

/// The gradients of cos and sin, and with `writes_input_grads` those of the inputs. `op` is the name of the operator.
void rotary_backward(const char* op, const RotaryBackwardProblem& problem, bool writes_input_grads, DType dtype);

/// @param frequencies,tables  the dtypes of `inv_freq` and of the tables: float32 or float64.
void rotary_tables(const FrequenciesProblem& problem, DType frequencies, DType tables);

/// @param tables,result_dtype  the dtypes of the tables and of `result`, the gradient of `inv_freq`: float32 or
/// float64.
void rotary_tables_backward(const FrequenciesBackwardProblem& problem, DType tables, void* result, DType result_dtype);

void qk_norm_rotate(const QKNormRotaryProblem& problem, DType dtype);
void qk_norm_rotate_backward(const QKNormRotaryBackwardProblem& problem, DType dtype);

// Attention in 16-bit dtypes.

/// Whether the current device has compute capability 8.0 or later and the library contains code of 8.0 or later for it.
bool has_attention_kernels();
void attention_forward(const AttentionForwardProblem& problem, DType dtype);
void attention_backward(AttentionBackwardProblem problem, DType dtype);

/// Merges two parts. @param first,second,out  the dtypes of outputs: `first` and `out` are `second`, or that of sums.
void merge_parts(const MergePartsProblem& problem, DType first, DType second, DType out);

/// Adds gradients. @param terms,out  dtypes: `out` is that of terms, or that of sums.
void sum_parts(const SumPartsProblem& problem, DType terms, DType out);

/// For blocks of rows of scores in memory. @param dtype  float32 or float64.
void attention_softmax_rows(const AttentionRowsProblem& problem, DType dtype);
void attention_gradient_rows(const AttentionRowsProblem& problem, DType dtype);
void attention_find_infinities(const AttentionRowsProblem& problem, DType dtype);
void attention_add_infinities(const AttentionRowsProblem& problem, DType dtype);

void alibi_bias(const AlibiAddProblem& problem, DType dtype);
void alibi_add(const AlibiAddProblem& problem, DType dtype);
void alibi_mask(const AlibiAddProblem& problem, DType dtype);
void alibi_softmax(const AlibiSoftmaxProblem& problem, DType dtype);
void alibi_softmax_backward(const AlibiSoftmaxBackwardProblem& problem, DType dtype);

/// @param grad  the gradient of scores.
/// @param result  the gradient of slopes, `[H]`: float64 for float64, float32 for all others.
void alibi_slopes_backward(const AlibiShape& shape, const ScoresIn& grad, DType dtype, void* result);

}  // namespace posenc::cuda
