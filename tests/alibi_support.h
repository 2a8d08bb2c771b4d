#pragma once

#include "support.h"

#include <posenc/alibi.h>

/// What the tests of ALiBi share: random calls of its operators, their results by a scalar loop in float64 from the
/// formulas alone, and how far rounding may take a kernel from them.
namespace posenc::test {

// ---------------------------------------------------------------------------------------------------------------------
// Random calls

enum class MaskStrides { dense, every_other, transposed, one_batch };
constexpr int kMaskStrides = static_cast<int>(MaskStrides::one_batch) + 1;

/// One call of an ALiBi operator, described so that it can be printed and made again.
struct AlibiCase {
  std::string name = "Default";
  bool batched = true;  // [B, H, Sq, Sk]; otherwise [H, Sq, Sk]
  int64_t batch = 2;
  int64_t heads = 3;
  int64_t q_len = 5;
  int64_t k_len = 7;
  Strides strides = Strides::dense;  // heads are what `Strides` calls tokens, queries heads, and keys channels
  bool causal = false;
  std::optional<int64_t> query_offset = std::nullopt;
  double scale = 1;
  bool masked = false;
  MaskStrides mask_strides = MaskStrides::dense;
  bool every_other_slope = false;

  std::vector<int64_t> sizes() const;
};

std::ostream& operator<<(std::ostream& stream, const AlibiCase& c);

/// Arguments of a call; `scale` and `key_padding_mask` are those of `alibi_softmax` alone.
struct AlibiInputs {
  at::Tensor scores;
  at::Tensor slopes;
  bool causal = false;
  std::optional<int64_t> query_offset = std::nullopt;
  double scale = 1;
  std::optional<at::Tensor> key_padding_mask = std::nullopt;
};

/// Arguments as `c` describes them, drawn on the CPU and so the same for every device. Slopes are between 0 and 1 and
/// multiples of 2^-8, so that central differences move them exactly.
AlibiInputs make_alibi_inputs(const AlibiCase& c, const Target& target);

/// A random mask `[batch, k_len]` in which about a third of the keys are masked.
at::Tensor random_mask(int64_t batch, int64_t k_len, at::DeviceType device, MaskStrides strides = MaskStrides::dense);

/// Copies of these arguments, detached, of which those named require grad.
AlibiInputs with_alibi_grad(const AlibiInputs& in, bool scores, bool slopes);

/// Calls of the operators on these arguments.
at::Tensor bias_of(const AlibiInputs& in, at::ScalarType dtype);
at::Tensor add_of(const AlibiInputs& in);
at::Tensor softmax_of(const AlibiInputs& in);

// ---------------------------------------------------------------------------------------------------------------------
// Expected values, float64 on the CPU

/// Distances `|query_offset + i - j|` of queries and keys, `[Sq, Sk]`.
at::Tensor scalar_distances(int64_t q_len, int64_t k_len, const std::optional<int64_t>& query_offset = std::nullopt);

/// `-slope * distance`, minus infinity for later keys with `causal`: `[H, Sq, Sk]`.
at::Tensor scalar_bias(
    const at::Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal = false,
    const std::optional<int64_t>& query_offset = std::nullopt);

/// The bias of the scores of `in`, with minus infinity where the mask hides a key; of the shape of the scores.
at::Tensor scalar_bias(const AlibiInputs& in);

/// Softmax over the keys; rows with nothing visible are zeros.
at::Tensor scalar_softmax(const AlibiInputs& in);

/// Gradients of `sum(grad * result)`, with the sum of the absolute terms of each gradient to a slope.
struct AlibiGradients {
  at::Tensor scores;
  at::Tensor slopes;
  at::Tensor slopes_magnitude;
};

/// Of `alibi_add(in)`, and of `alibi_bias` where `grad` is `[H, Sq, Sk]`.
AlibiGradients scalar_add_gradients(const AlibiInputs& in, const at::Tensor& grad);

/// Of `alibi_softmax(in)`.
AlibiGradients scalar_softmax_gradients(const AlibiInputs& in, const at::Tensor& grad);

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons

/// As `expect_within`, where infinities have to be matched exactly.
void expect_within_or_infinite(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound);

/// Expects the results of the operators to be those of the scalar loop but for rounding; see the definitions.
void expect_bias(const at::Tensor& actual, const AlibiInputs& in, int64_t q_len, int64_t k_len);
void expect_sum(const at::Tensor& actual, const AlibiInputs& in);
void expect_softmax(const at::Tensor& actual, const AlibiInputs& in);

/// Expects gradients of `alibi_softmax` to be those of the scalar loop but for rounding; undefined ones are not looked
/// at.
void expect_softmax_gradients(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    const AlibiInputs& in,
    const at::Tensor& grad);

/// Expects the gradient of `alibi_softmax` to slopes within 1 % (half and bfloat16), 1e-5 (float32) or 1e-12 (float64)
/// of float64, as a vector: of its norm, or of the root of the sum of its squared terms, where these cancel so that
/// the norm is smaller. The saved probabilities are rounded, each by itself, so no backward pass can do better than a
/// part of the latter.
void expect_accurate_slopes(const at::Tensor& actual, const AlibiInputs& in, const at::Tensor& grad);

/// Expects a gradient to slopes within `relative` of the sum of its absolute terms, and rounded to its dtype.
void expect_slope_gradient(const at::Tensor& actual, const AlibiGradients& expected, double relative);

}  // namespace posenc::test
