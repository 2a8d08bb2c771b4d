#pragma once

#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <functional>
#include <string>
#include <vector>

/// Shared by the tests of attention on a GPU: calls of every form, and expected results in float64.
namespace posenc::test {

/// The log output of `action`, at level debug.
std::string logged(const std::function<void()>& action);

/// Texts of the log that say what computes a call.
inline constexpr const char* kNotFused = "in blocks of matrix products";
inline constexpr const char* kTiled = "by the kernels of this library";

/// out and lse, and the gradients of q, k, v and slopes for `grad`, the gradient of out in its dtype.
TensorList everything(const AttentionInputs& inputs, const at::Tensor& grad);

/// The same results by the reference version in float64.
TensorList everything_in_float64(const AttentionInputs& inputs, const at::Tensor& grad);

/// The names of the results of `everything`.
inline constexpr const char* kNames[] = {"out", "lse", "dq", "dk", "dv", "dslopes"};

/// Tolerance of `relative_error` for result `result` of `everything`. The independent roundings of `out` and of the
/// probabilities amount to about one unit roundoff in the norm. Gradients also have those of `out` and dS. The terms of
/// a slope gradient mostly cancel.
double tolerance(size_t result, at::ScalarType dtype);

/// Expects `everything` of a call on the GPU to equal that in float64.
void expect_everything_right(
    const AttentionCase& c,
    const AttentionInputs& in,
    const at::Tensor& grad,
    const TensorList& actual);

/// Calls of every form of fused attention: masks, offsets, lengths, packed sequences, head sizes and strides.
std::vector<AttentionCase> attention_forms();

/// The name of a test over a dtype and a call.
std::string attention_form_name(const ::testing::TestParamInfo<std::tuple<at::ScalarType, AttentionCase>>& info);

}  // namespace posenc::test
