#include "alibi_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <random>

namespace posenc::test {
namespace {

/// Random calls of all operators; POSENC_TEST_CASES sets their number.
class AlibiRandom : public TargetTest {};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiRandom, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiRandom, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

class RandomCases {
 public:
  explicit RandomCases(uint64_t case_seed) : generator_(case_seed) {}

  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator_); }
  bool coin() { return between(0, 1) == 1; }

  AlibiCase draw() {
    AlibiCase c;
    c.name = "Random";
    c.batched = coin();
    c.batch = between(1, 3);
    c.heads = between(1, 6);
    c.q_len = between(1, 20);
    c.k_len = between(0, 3) == 0 ? between(1, 3000) : between(1, 70);
    if (coin()) {
      c.strides = static_cast<Strides>(between(0, kStrides - 1));
    }
    c.causal = coin();
    if (coin()) {
      c.query_offset = between(-8, c.k_len + 8);
    }
    if (coin()) {
      c.scale = static_cast<double>(between(-32, 64)) / 16;
    }
    c.masked = coin();
    c.mask_strides = static_cast<MaskStrides>(between(0, kMaskStrides - 1));
    c.every_other_slope = coin();
    return c;
  }

  Strides strides() { return static_cast<Strides>(between(0, kStrides - 1)); }

 private:
  std::mt19937_64 generator_;
};

void check_case(RandomCases& random, const Target& target) {
  const AlibiCase c = random.draw();
  SCOPED_TRACE(::testing::Message() << c);
  const AlibiInputs in = with_alibi_grad(make_alibi_inputs(c, target), true, true);
  const at::Tensor grad = random_tensor(c.sizes(), target, random.strides());

  const at::Tensor bias = bias_of(in, target.dtype);
  expect_bias(bias, in, c.q_len, c.k_len);
  AlibiInputs unmasked = in;
  unmasked.key_padding_mask.reset();
  AlibiInputs one = unmasked;
  one.scores = c.batched ? in.scores.detach().select(0, 0) : in.scores;
  const at::Tensor grad_of_bias = c.batched ? grad.select(0, 0) : grad;
  expect_slope_gradient(
      gradients({bias}, {in.slopes}, {grad_of_bias})[0], scalar_add_gradients(one, grad_of_bias), 1e-6);

  const at::Tensor sum = add_of(in);
  expect_sum(sum, in);
  const TensorList of_sum = gradients({sum}, {in.scores, in.slopes}, {grad});
  const AlibiGradients expected = scalar_add_gradients(unmasked, grad);
  expect_within(of_sum[0], expected.scores, at::zeros({}, at::kDouble));
  expect_slope_gradient(of_sum[1], expected, 1e-6);

  const at::Tensor softmax = softmax_of(in);
  expect_softmax(softmax, in);
  const TensorList of_softmax = gradients({softmax}, {in.scores, in.slopes}, {grad});
  expect_softmax_gradients(of_softmax[0], of_softmax[1], in, grad);
  expect_accurate_slopes(of_softmax[1], in, grad);
}

TEST_P(AlibiRandom, CallsMatchTheFormula) {
  for_each_seed(100, [](uint64_t case_seed) {
    RandomCases random(case_seed);
    check_case(random, GetParam());
  });
}

}  // namespace
}  // namespace posenc::test
