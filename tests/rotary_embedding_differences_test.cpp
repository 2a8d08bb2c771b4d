#include "gradcheck.h"
#include "rotary_embedding_autograd_support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

// Derivatives of rotary_embedding against central differences in float64.
namespace posenc::test {
namespace {

Differentiable pair_function(const RotaryInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    const auto [q, k] = posenc::rotary_embedding_qk(
        arguments[0], arguments[1], arguments[2], arguments[3], in.positions, in.interleaved, in.conjugate,
        in.pair_axes);
    return {q, k};
  };
}

Differentiable single_function(const RotaryInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    return {posenc::rotary_embedding(
        arguments[0], arguments[1], arguments[2], in.positions, in.interleaved, in.conjugate, in.pair_axes)};
  };
}

class RotaryEmbeddingDifferences : public ::testing::TestWithParam<std::tuple<at::DeviceType, RotaryCase>> {
 protected:
  void SetUp() override {
    require_device(std::get<0>(GetParam()));
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    inputs_ = make_inputs(std::get<1>(GetParam()), {std::get<0>(GetParam()), at::kDouble});
  }

  RotaryInputs inputs_;
};

TEST_P(RotaryEmbeddingDifferences, GradientsOfOneTensorAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, false, true, true);
  gradcheck(single_function(in), {in.q, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, GradientsOfThePairAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, true, true, true);
  gradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, GradientsOfCosAlone) {
  const RotaryInputs in = with_grad(inputs_, false, false, true, false);
  gradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, GradientsOfSinAlone) {
  const RotaryInputs in = with_grad(inputs_, false, false, false, true);
  gradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfInputs) {
  const RotaryInputs in = with_grad(inputs_, true, true, false, false);
  gradgradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfOneTensorAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, false, true, true);
  gradgradcheck(single_function(in), {in.q, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfThePairAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, true, true, true);
  gradgradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfCosAlone) {
  const RotaryInputs in = with_grad(inputs_, true, true, true, false);
  gradgradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

std::string case_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, RotaryCase>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    RotaryEmbeddingDifferences,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(small_rotary_cases())),
    case_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    RotaryEmbeddingDifferences,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(small_rotary_cases())),
    case_name);

}  // namespace
}  // namespace posenc::test
