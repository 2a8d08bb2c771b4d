#include "support.h"

#include <posenc/frequencies.h>
#include <posenc/reference.h>

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace posenc::test {
namespace {

TEST(RotaryInvFreq, IsAPowerOfTheBase) {
  const auto expect_values = [](const at::Tensor& actual, const std::vector<double>& values) {
    const at::Tensor expected = at::tensor(values, at::kDouble);
    expect_within(actual, expected, expected * 4 * unit_roundoff(at::kDouble));
  };
  expect_values(posenc::rotary_inv_freq(2), {1});
  expect_values(posenc::rotary_inv_freq(4), {1, 0.01});
  expect_values(posenc::rotary_inv_freq(8), {1, 0.1, 0.01, 0.001});
  expect_values(posenc::rotary_inv_freq(6, 8), {1, 0.5, 0.25});
  expect_values(posenc::rotary_inv_freq(4, 0.25), {1, 2});
}

TEST(RotaryInvFreq, IsFloat64OnTheCpu) {
  const at::Tensor inv_freq = posenc::rotary_inv_freq(128, 500000);
  EXPECT_EQ(inv_freq.scalar_type(), at::kDouble);
  EXPECT_TRUE(inv_freq.is_cpu());
  EXPECT_EQ(inv_freq.sizes(), at::IntArrayRef({64}));
}

TEST(RotaryInvFreq, RejectsBadArguments) {
  for (const int64_t rotary_dim : {0, -2, 7}) {
    expect_error([=] { posenc::rotary_inv_freq(rotary_dim); }, {"rotary_dim", "even", std::to_string(rotary_dim)});
  }
  expect_error([] { posenc::rotary_inv_freq(8, 0); }, {"base", "positive", "got 0"});
  expect_error([] { posenc::rotary_inv_freq(8, -10000); }, {"base", "positive", "got -10000"});
  expect_error([] { posenc::rotary_inv_freq(8, std::nan("")); }, {"base", "positive", "nan"});
  expect_error(
      [] { posenc::rotary_inv_freq(8, std::numeric_limits<double>::infinity()); }, {"base", "finite", "got inf"});
}

class RotaryTables : public DeviceTest {
 protected:
  at::Tensor inv_freq(int64_t rotary_dim, double base = 10000.0) const {
    return posenc::rotary_inv_freq(rotary_dim, base).to(device());
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryTables, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryTables, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryTables, HoldCosinesAndSinesOfPositionTimesFrequency) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const auto [cos, sin] = posenc::rotary_tables(inv_freq(6, 8), 40, dtype);
    at::Tensor expected_cos = at::empty({40, 3}, at::kDouble);
    at::Tensor expected_sin = at::empty({40, 3}, at::kDouble);
    for (int64_t p = 0; p < 40; ++p) {
      for (int64_t i = 0; i < 3; ++i) {
        const double angle = static_cast<double>(p) * std::pow(0.5, static_cast<double>(i));
        expected_cos[p][i].fill_(std::cos(angle));
        expected_sin[p][i].fill_(std::sin(angle));
      }
    }
    // The angle has the error of the frequency, a few roundings. The result is rounded once.
    const at::Tensor bound = at::full({}, unit_roundoff(dtype) + 40 * 4 * unit_roundoff(at::kDouble), at::kDouble);
    expect_within(cos, expected_cos, bound);
    expect_within(sin, expected_sin, bound);
    EXPECT_EQ(cos.scalar_type(), dtype);
    EXPECT_EQ(sin.scalar_type(), dtype);
    EXPECT_EQ(cos.device().type(), device().type());
    EXPECT_EQ(sin.device().type(), device().type());
  }
}

TEST_P(RotaryTables, FirstRowIsNoRotation) {
  const auto [cos, sin] = posenc::rotary_tables(inv_freq(8), 1);
  expect_same_bits(cos, at::ones({1, 4}));
  expect_same_bits(sin, at::zeros({1, 4}));
}

TEST_P(RotaryTables, AnglesOfAMillionTokensAreRight) {
  constexpr int64_t length = 1 << 20;
  constexpr int64_t rotary_dim = 8;
  constexpr double base = 500000;
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const auto [cos, sin] = posenc::rotary_tables(inv_freq(rotary_dim, base), length, dtype);
    const at::Tensor last_cos = cos[length - 1].cpu().to(at::kDouble);
    const at::Tensor last_sin = sin[length - 1].cpu().to(at::kDouble);
    for (int64_t i = 0; i < rotary_dim / 2; ++i) {
      const long double frequency = std::pow(static_cast<long double>(base), -2.0L * i / rotary_dim);
      const long double angle = (length - 1) * frequency;
      // Frequency and product have an error of a few roundings in float64.
      const double tolerance = static_cast<double>(angle) * 4 * unit_roundoff(at::kDouble) + unit_roundoff(dtype);
      EXPECT_NEAR(last_cos[i].item<double>(), static_cast<double>(std::cos(angle)), tolerance) << i;
      EXPECT_NEAR(last_sin[i].item<double>(), static_cast<double>(std::sin(angle)), tolerance) << i;
    }
  }
}

TEST_P(RotaryTables, OfFloat32AreThoseOfFloat64RoundedOnce) {
  const auto [cos, sin] = posenc::rotary_tables(inv_freq(64), 3000, at::kFloat);
  const auto [wide_cos, wide_sin] = posenc::rotary_tables(inv_freq(64), 3000, at::kDouble);
  expect_same_bits(cos, wide_cos.to(at::kFloat));
  expect_same_bits(sin, wide_sin.to(at::kFloat));
}

TEST_P(RotaryTables, OfFloat32FrequenciesHaveAnglesOfFloat64) {
  const at::Tensor narrow = inv_freq(64).to(at::kFloat);
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const auto [cos, sin] = posenc::rotary_tables(narrow, 3000, dtype);
    const auto [wide_cos, wide_sin] = posenc::rotary_tables(narrow.to(at::kDouble), 3000, dtype);
    expect_same_bits(cos, wide_cos);
    expect_same_bits(sin, wide_sin);
  }
}

TEST_P(RotaryTables, AreMultipliedWithTheAttentionFactor) {
  const auto [cos, sin] = posenc::rotary_tables(inv_freq(64), 300, at::kFloat, 1.25);
  const auto [wide_cos, wide_sin] = posenc::rotary_tables(inv_freq(64), 300, at::kDouble);
  expect_same_bits(cos, (wide_cos * 1.25).to(at::kFloat));
  expect_same_bits(sin, (wide_sin * 1.25).to(at::kFloat));
}

TEST_P(RotaryTables, TakeFrequenciesOfAnyStride) {
  const at::Tensor every_other = at::stack({inv_freq(64), at::zeros_like(inv_freq(64))}, 1).select(1, 0);
  const auto [cos, sin] = posenc::rotary_tables(every_other, 20);
  const auto [dense_cos, dense_sin] = posenc::rotary_tables(inv_freq(64), 20);
  expect_same_bits(cos, dense_cos);
  expect_same_bits(sin, dense_sin);
}

TEST_P(RotaryTables, MatchTheReference) {
  const auto [cos, sin] = posenc::rotary_tables(inv_freq(10), 37, at::kDouble, 1.5);
  const auto [expected_cos, expected_sin] = posenc::reference::rotary_tables(inv_freq(10), 37, at::kDouble, 1.5);
  // Both are within two ulp of the exact value, which is at most 1.5.
  const at::Tensor bound = at::full({}, 1.5 * 8 * unit_roundoff(at::kDouble), at::kDouble);
  expect_within(cos, expected_cos.cpu(), bound);
  expect_within(sin, expected_sin.cpu(), bound);
}

TEST_P(RotaryTables, OfMoreThan128PairsAreWhole) {
  const auto [cos, sin] = posenc::rotary_tables(inv_freq(600), 3, at::kDouble);
  const at::Tensor angles = posenc::rotary_inv_freq(600) * 2;
  const at::Tensor bound = at::full({}, 8 * unit_roundoff(at::kDouble), at::kDouble);
  expect_within(cos[2], angles.cos(), bound);
  expect_within(sin[2], angles.sin(), bound);
}

TEST_P(RotaryTables, OfLengthZeroAreEmpty) {
  const auto [cos, sin] = posenc::rotary_tables(inv_freq(8), 0);
  EXPECT_EQ(cos.sizes(), at::IntArrayRef({0, 4}));
  EXPECT_EQ(sin.sizes(), at::IntArrayRef({0, 4}));
}

TEST_P(RotaryTables, RejectBadArguments) {
  const at::Tensor good = inv_freq(8);
  for (const at::ScalarType dtype : {at::kHalf, at::kLong}) {
    expect_error(
        [&] { posenc::rotary_tables(good.to(dtype), 4); }, {"inv_freq", "float32 or float64", at::toString(dtype)});
  }
  expect_error([&] { posenc::rotary_tables(good.view({2, 2}), 4); }, {"inv_freq", "[R/2]", "[2, 2]"});
  expect_error([&] { posenc::rotary_tables(at::Tensor(), 4); }, {"inv_freq", "undefined"});
  expect_error([&] { posenc::rotary_tables(good, -1); }, {"length", "-1"});
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kLong}) {
    expect_error([&] { posenc::rotary_tables(good, 4, dtype); }, {"dtype", "float32 or float64", at::toString(dtype)});
  }
  for (const double factor : {0.0, -1.0, std::nan(""), static_cast<double>(INFINITY)}) {
    expect_error([&] { posenc::rotary_tables(good, 4, at::kFloat, factor); }, {"attention_factor", "positive, finite"});
  }
}

}  // namespace
}  // namespace posenc::test
