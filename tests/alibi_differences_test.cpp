#include "alibi_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>

// Derivatives of the operators of ALiBi against central differences in float64.
namespace posenc::test {
namespace {

/// Zeros in place of the infinities of keys that causality hides, whose products with a cotangent are infinite or NaN.
at::Tensor without_infinities(const at::Tensor& y) {
  return y.masked_fill(y.detach().isinf(), 0);
}

Differentiable bias_function(const AlibiInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    AlibiInputs moved = in;
    moved.slopes = arguments[0];
    return {without_infinities(bias_of(moved, at::kDouble))};
  };
}

Differentiable add_function(const AlibiInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    AlibiInputs moved = in;
    moved.scores = arguments[0];
    moved.slopes = arguments[1];
    return {without_infinities(add_of(moved))};
  };
}

Differentiable softmax_function(const AlibiInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    AlibiInputs moved = in;
    moved.scores = arguments[0];
    moved.slopes = arguments[1];
    return {softmax_of(moved)};
  };
}

class AlibiDifferences : public ::testing::TestWithParam<std::tuple<at::DeviceType, AlibiCase>> {
 protected:
  void SetUp() override {
    require_device(std::get<0>(GetParam()));
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    narrow_ = make_alibi_inputs(std::get<1>(GetParam()), {std::get<0>(GetParam()), at::kDouble});
    wide_ = narrow_;
    wide_.slopes = narrow_.slopes.to(at::kDouble);
  }

  /// float64 scores with float32 and with float64 slopes.
  AlibiInputs narrow_;
  AlibiInputs wide_;
};

TEST_P(AlibiDifferences, GradientOfTheBias) {
  for (const AlibiInputs& inputs : {narrow_, wide_}) {
    const AlibiInputs in = with_alibi_grad(inputs, false, true);
    gradcheck(bias_function(in), {in.slopes});
  }
}

TEST_P(AlibiDifferences, GradientsOfTheSum) {
  for (const AlibiInputs& inputs : {narrow_, wide_}) {
    for (const auto& [scores, slopes] : {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
      const AlibiInputs in = with_alibi_grad(inputs, scores, slopes);
      gradcheck(add_function(in), {in.scores, in.slopes});
    }
  }
}

TEST_P(AlibiDifferences, GradientsOfTheSoftmax) {
  for (const AlibiInputs& inputs : {narrow_, wide_}) {
    for (const auto& [scores, slopes] : {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
      const AlibiInputs in = with_alibi_grad(inputs, scores, slopes);
      gradcheck(softmax_function(in), {in.scores, in.slopes}, kSmooth);
    }
  }
}

TEST_P(AlibiDifferences, SecondDerivativesOfTheBias) {
  const AlibiInputs in = with_alibi_grad(wide_, false, true);
  gradgradcheck(bias_function(in), {in.slopes});
}

TEST_P(AlibiDifferences, SecondDerivativesOfTheSum) {
  const AlibiInputs in = with_alibi_grad(wide_, true, true);
  gradgradcheck(add_function(in), {in.scores, in.slopes});
}

TEST_P(AlibiDifferences, SecondDerivativesOfTheSoftmax) {
  for (const auto& [scores, slopes] : {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
    const AlibiInputs in = with_alibi_grad(wide_, scores, slopes);
    gradgradcheck(softmax_function(in), {in.scores, in.slopes}, kSmooth);
  }
}

std::string case_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, AlibiCase>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiDifferences,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(small_alibi_cases())),
    case_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiDifferences,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(small_alibi_cases())),
    case_name);

}  // namespace
}  // namespace posenc::test
