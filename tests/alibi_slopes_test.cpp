#include "support.h"

#include <posenc/alibi.h>

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

// Slopes: Press, Smith, Lewis 2022 (https://arxiv.org/abs/2108.12409), section 3; for head counts that are not powers
// of two, get_slopes of the authors (https://github.com/ofirpress/attention_with_linear_biases)
namespace posenc::test {
namespace {

/// Expects float32 slopes that are `expected`, rounded once.
void expect_slopes(const at::Tensor& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.scalar_type(), at::kFloat);
  ASSERT_EQ(actual.sizes(), at::IntArrayRef({static_cast<int64_t>(expected.size())}));
  for (size_t h = 0; h < expected.size(); ++h) {
    const double slope = actual[static_cast<int64_t>(h)].item<double>();
    EXPECT_NEAR(slope, expected[h], expected[h] * (unit_roundoff(at::kFloat) + 0x1p-50)) << "head " << h;
  }
}

TEST(AlibiSlopes, OfOneHead) {
  expect_slopes(posenc::alibi_slopes(1), {1.0 / 256});
}

TEST(AlibiSlopes, OfThreeHeads) {
  expect_slopes(posenc::alibi_slopes(3), {1.0 / 16, 1.0 / 256, 1.0 / 4});
}

TEST(AlibiSlopes, OfSixHeads) {
  expect_slopes(posenc::alibi_slopes(6), {1.0 / 4, 1.0 / 16, 1.0 / 64, 1.0 / 256, 1.0 / 2, 1.0 / 8});
}

TEST(AlibiSlopes, OfEightHeadsAreThoseOfThePaper) {
  expect_slopes(
      posenc::alibi_slopes(8), {1.0 / 2, 1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32, 1.0 / 64, 1.0 / 128, 1.0 / 256});
}

TEST(AlibiSlopes, OfTwelveHeads) {
  expect_slopes(
      posenc::alibi_slopes(12),
      {1.0 / 2, 1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32, 1.0 / 64, 1.0 / 128, 1.0 / 256, 0.70710678118654752,
       0.35355339059327376, 0.17677669529663688, 0.088388347648318441});
}

TEST(AlibiSlopes, OfFortyHeads) {
  // 32 heads: powers of 2^(-1/4). 8 heads: odd powers of 2^(-1/8).
  const std::vector<double> fourths{0.84089641525371454, 0.70710678118654752, 0.59460355750136054, 0.5};
  std::vector<double> expected;
  expected.reserve(32);
  for (int h = 0; h < 32; ++h) {
    expected.push_back(std::ldexp(fourths[static_cast<size_t>(h % 4)], -(h / 4)));
  }
  const std::vector<double> eighths{0.91700404320467123, 0.77110541270397041, 0.64841977732550483, 0.54525386633262883};
  for (int h = 0; h < 8; ++h) {
    expected.push_back(std::ldexp(eighths[static_cast<size_t>(h % 4)], -(h / 4)));
  }
  expect_slopes(posenc::alibi_slopes(40), expected);
}

TEST(AlibiSlopes, OfPowersOfTwoEndAtMaxBias) {
  for (const double max_bias : {1.0, 8.0, 16.0, 10.5}) {
    for (const int64_t heads : {1, 2, 4, 16, 64, 128}) {
      const at::Tensor slopes = posenc::alibi_slopes(heads, max_bias);
      const double last = std::exp2(-max_bias);
      EXPECT_NEAR(slopes[heads - 1].item<double>(), last, last * 0x1p-23);
    }
  }
}

// The rule of the authors in float64, rounded once. Powers in float32 differ in the last bit.
TEST(AlibiSlopes, AreFloat64RoundedOnce) {
  for (const double max_bias : {8.0, 5.0, 12.5}) {
    for (int64_t heads = 1; heads <= 130; ++heads) {
      int64_t power = 1;
      while (2 * power <= heads) {
        power *= 2;
      }
      const at::Tensor expected = at::empty({heads}, at::kFloat);
      for (int64_t h = 0; h < heads; ++h) {
        const auto n = static_cast<double>(power);
        const double exponent =
            h < power ? static_cast<double>(h + 1) / n : static_cast<double>(2 * (h - power) + 1) / (2 * n);
        expected.data_ptr<float>()[h] = static_cast<float>(std::exp2(-max_bias * exponent));
      }
      SCOPED_TRACE(heads);
      expect_same_bits(posenc::alibi_slopes(heads, max_bias), expected);
    }
  }
}

TEST(AlibiSlopes, WithMaxBias) {
  expect_slopes(posenc::alibi_slopes(4, 4), {0.5, 0.25, 0.125, 0.0625});
  expect_slopes(posenc::alibi_slopes(3, 4), {0.25, 0.0625, 0.5});
}

TEST(AlibiSlopes, OfBadArgumentsAreErrors) {
  expect_error([] { posenc::alibi_slopes(0); }, {"num_heads", "0"});
  expect_error([] { posenc::alibi_slopes(-3); }, {"num_heads", "-3"});
  expect_error([] { posenc::alibi_slopes(8, -1); }, {"max_bias", "-1"});
  expect_error([] { posenc::alibi_slopes(8, std::nan("")); }, {"max_bias", "nan"});
  expect_error([] { posenc::alibi_slopes(8, std::numeric_limits<double>::infinity()); }, {"max_bias", "inf"});
}

}  // namespace
}  // namespace posenc::test
