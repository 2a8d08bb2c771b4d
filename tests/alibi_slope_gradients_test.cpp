#include "alibi_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

/// Gradients of slopes against float64 on the same rounded inputs, where distances or the mean of the incoming gradient
/// are large compared to the result.
class AlibiSlopeGradients : public TargetTest {};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiSlopeGradients, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiSlopeGradients, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

struct Gradients {
  AlibiInputs in;
  at::Tensor grad, softmax, add, bias;
};

/// Gradients of slopes of all operators, for one random call and an incoming gradient with the given mean.
Gradients gradients_of(const AlibiCase& c, const Target& target, double mean, double slope = 0) {
  Gradients result;
  result.in = make_alibi_inputs(c, target);
  if (slope != 0) {
    result.in.slopes.fill_(slope);
  }
  result.in = with_alibi_grad(result.in, true, true);
  result.grad = random_tensor(c.sizes(), target) + mean;
  const auto slopes_of = [&](const at::Tensor& output, const at::Tensor& grad) {
    return gradients({output}, {result.in.slopes}, {grad})[0];
  };
  result.softmax = slopes_of(softmax_of(result.in), result.grad);
  result.add = slopes_of(add_of(result.in), result.grad);
  result.bias = slopes_of(bias_of(result.in, target.dtype), result.grad.select(0, 0));
  return result;
}

/// Expects the slope gradient of alibi_add or alibi_bias. Incoming gradients are exact in every dtype, so half and
/// bfloat16 have the tolerance of float32 slopes.
void expect_accurate_sum(const at::Tensor& actual, const AlibiInputs& in, const at::Tensor& grad) {
  const AlibiGradients expected = scalar_add_gradients(in, grad);
  const double error = (actual.cpu().to(at::kDouble) - expected.slopes).norm().item<double>();
  const double relative = actual.scalar_type() == at::kDouble ? 1e-12 : 1e-5;
  EXPECT_LE(error, relative * expected.slopes.norm().item<double>());
}

AlibiCase case_of(int64_t batch, int64_t heads, int64_t q_len, int64_t k_len) {
  AlibiCase c;
  c.batch = batch;
  c.heads = heads;
  c.q_len = q_len;
  c.k_len = k_len;
  return c;
}

TEST_P(AlibiSlopeGradients, FewKeysFarFromTheirQueries) {
  AlibiCase c = case_of(2, 1, 64, 7);
  c.causal = true;
  c.query_offset = 3;
  for_each_seed(10, [&](uint64_t) {
    const Gradients found = gradients_of(c, GetParam(), 0);
    expect_accurate_slopes(found.softmax, found.in, found.grad);
  });
}

TEST_P(AlibiSlopeGradients, RowsOfOddLength) {
  for (const bool causal : {false, true}) {
    AlibiCase c = case_of(4, 1, 257, 257);
    c.causal = causal;
    const Gradients found = gradients_of(c, GetParam(), 0);
    expect_accurate_slopes(found.softmax, found.in, found.grad);
  }
}

TEST_P(AlibiSlopeGradients, IncomingGradientsOfLargeMean) {
  for (const double slope : {0.5, 0.00390625}) {
    AlibiCase c = case_of(1, 2, 512, 2048);
    c.causal = true;
    const Gradients found = gradients_of(c, GetParam(), 4, slope);
    expect_accurate_slopes(found.softmax, found.in, found.grad);
    AlibiInputs in = found.in;
    in.key_padding_mask.reset();
    expect_accurate_sum(found.add, in, found.grad);
    in.scores = in.scores.detach().select(0, 0);
    expect_accurate_sum(found.bias, in, found.grad.select(0, 0));
  }
}

// Adding a constant to all distances of a row changes neither the softmax nor its gradient.
TEST_P(AlibiSlopeGradients, QueriesFarBehindTheLastKey) {
  AlibiCase c = case_of(1, 3, 8, 300);
  c.query_offset = 1 << 20;
  const Gradients found = gradients_of(c, GetParam(), 4, 0.00390625);
  expect_accurate_slopes(found.softmax, found.in, found.grad);
}

TEST_P(AlibiSlopeGradients, RowsLongerThanABlockKeeps) {
  const Gradients found = gradients_of(case_of(1, 1, 3, 20001), GetParam(), 4, 0.00390625);
  expect_accurate_slopes(found.softmax, found.in, found.grad);
}

// Probabilities sum to 1, so the gradient is zero. The rounding of their sum must not add to it.
TEST_P(AlibiSlopeGradients, OfASumOfProbabilitiesIsZero) {
  const AlibiInputs in = with_alibi_grad(make_alibi_inputs(case_of(1, 2, 64, 1024), GetParam()), true, true);
  const at::Tensor p = softmax_of(in);
  const TensorList found = gradients({p}, {in.scores, in.slopes}, {at::full_like(p, 4)});
  const double roundoff = unit_roundoff(table_dtype(dtype()));
  EXPECT_LE(found[0].abs().max().item<double>(), 64 * roundoff);
  EXPECT_LE(found[1].abs().max().item<double>(), 64 * roundoff * 64);
}

}  // namespace
}  // namespace posenc::test
