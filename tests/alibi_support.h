#pragma once

#include "support.h"

#include <posenc/alibi.h>

/// Shared by the tests of ALiBi: random calls of its operators, expected results from scalar loops over the formulas in
/// float64, and comparisons within derived rounding errors.
namespace posenc::test {

// ---------------------------------------------------------------------------------------------------------------------
// Random calls

enum class MaskStrides { dense, every_other, transposed, one_batch };
constexpr int kMaskStrides = static_cast<int>(MaskStrides::one_batch) + 1;

/// Printable description of one call of an ALiBi operator, from which `make_alibi_inputs` makes the arguments.
struct AlibiCase {
  std::string name = "Default";
  bool batched = true;  // [B, H, Sq, Sk]; otherwise [H, Sq, Sk]
  int64_t batch = 2;
  int64_t heads = 3;
  int64_t q_len = 5;
  int64_t k_len = 7;
  Strides strides = Strides::dense;  // `Strides` calls dimension H token, Sq head and Sk channel
  bool causal = false;
  std::optional<int64_t> query_offset = std::nullopt;
  double scale = 1;
  bool masked = false;
  MaskStrides mask_strides = MaskStrides::dense;
  bool every_other_slope = false;

  std::vector<int64_t> sizes() const;
};

std::ostream& operator<<(std::ostream& stream, const AlibiCase& c);

/// Arguments of a call. Only `alibi_softmax` takes `scale` and `key_padding_mask`.
struct AlibiInputs {
  at::Tensor scores;
  at::Tensor slopes;
  bool causal = false;
  std::optional<int64_t> query_offset = std::nullopt;
  double scale = 1;
  std::optional<at::Tensor> key_padding_mask = std::nullopt;
};

/// Arguments as `c` describes them, drawn on the CPU, so every device gets the same. Slopes are multiples of 2^-8
/// between 0 and 1: adding the steps of central differences to them is exact.
AlibiInputs make_alibi_inputs(const AlibiCase& c, const Target& target);

/// One small call for each option.
std::vector<AlibiCase> small_alibi_cases();

/// A random bool mask `[batch, k_len]` that masks about a third of the keys.
at::Tensor random_mask(int64_t batch, int64_t k_len, at::DeviceType device, MaskStrides strides = MaskStrides::dense);

/// The same arguments with detached scores and slopes that require grad as given.
AlibiInputs with_alibi_grad(const AlibiInputs& in, bool scores, bool slopes);

/// `alibi_bias`, `alibi_add` and `alibi_softmax` on these arguments.
at::Tensor bias_of(const AlibiInputs& in, at::ScalarType dtype);
at::Tensor add_of(const AlibiInputs& in);
at::Tensor softmax_of(const AlibiInputs& in);

/// Fixture of tests of the operators that run with every dtype.
class Alibi : public TargetTest {
 protected:
  AlibiInputs inputs(const AlibiCase& c = AlibiCase()) const { return make_alibi_inputs(c, GetParam()); }
  at::Tensor on_device(const at::Tensor& tensor) const { return tensor.to(device()); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Expected values, float64 on the CPU

/// Distances `|query_offset + i - j|` between query i and key j, `[Sq, Sk]`.
at::Tensor scalar_distances(int64_t q_len, int64_t k_len, const std::optional<int64_t>& query_offset = std::nullopt);

/// `-slope * distance`, `[H, Sq, Sk]`; minus infinity for keys after the query with `causal`.
at::Tensor scalar_bias(
    const at::Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal = false,
    const std::optional<int64_t>& query_offset = std::nullopt);

/// The bias for `in`, shape of the scores; minus infinity for keys that `key_padding_mask` hides.
at::Tensor scalar_bias(const AlibiInputs& in);

/// `alibi_softmax(in)`; rows without visible keys are zeros.
at::Tensor scalar_softmax(const AlibiInputs& in);

/// Gradients of `sum(grad * result)`, and for each slope the sum of the absolute terms of its gradient.
struct AlibiGradients {
  at::Tensor scores;
  at::Tensor slopes;
  at::Tensor slopes_magnitude;
};

/// Gradients for `alibi_add(in)`, and for `alibi_bias` if `grad` is `[H, Sq, Sk]`.
AlibiGradients scalar_add_gradients(const AlibiInputs& in, const at::Tensor& grad);

/// Gradients for `alibi_softmax(in)`.
AlibiGradients scalar_softmax_gradients(const AlibiInputs& in, const at::Tensor& grad);

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons

/// `expect_within` for the finite elements of `expected`; infinite ones must be equal.
void expect_within_or_infinite(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound);

/// Expects results to equal those of the scalar loop within rounding; bounds are derived at the definitions.
void expect_bias(const at::Tensor& actual, const AlibiInputs& in, int64_t q_len, int64_t k_len);
void expect_sum(const at::Tensor& actual, const AlibiInputs& in);
void expect_softmax(const at::Tensor& actual, const AlibiInputs& in);

/// Expects gradients of `alibi_softmax` to equal those of the scalar loop within rounding; undefined ones are ignored.
void expect_softmax_gradients(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    const AlibiInputs& in,
    const at::Tensor& grad);

/// Expects the slope gradient of `alibi_softmax`, as a vector, within 1 % (half and bfloat16), 1e-5 (float32) or 1e-12
/// (float64) of the expected float64 value, relative to the larger of its norm and the root of the sum of its squared
/// terms, which is larger if terms cancel: each saved probability is rounded independently, so the error of any
/// backward pass grows with that root.
void expect_accurate_slopes(const at::Tensor& actual, const AlibiInputs& in, const at::Tensor& grad);

/// Expects a slope gradient within `relative` times the sum of its absolute terms, plus the rounding to its dtype.
void expect_slope_gradient(const at::Tensor& actual, const AlibiGradients& expected, double relative);

}  // namespace posenc::test
