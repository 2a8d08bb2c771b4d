#include "data/frequencies.h"
#include "rotary_scaling_support.h"

#include <posenc/frequencies.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

// Scalings of posenc/frequencies.h: frequencies against tests/data/frequencies.h, and errors.
namespace posenc::test {
namespace {

using posenc::DefaultScaling;
using posenc::DynamicNtkScaling;
using posenc::LinearScaling;
using posenc::Llama3Scaling;
using posenc::LongRopeScaling;
using posenc::ProportionalScaling;
using posenc::RotaryFrequencies;
using posenc::RotaryScaling;
using posenc::StaticNtkScaling;
using posenc::YarnScaling;

// ---------------------------------------------------------------------------------------------------------------------
// Values

/// Expects `expected` within rounding. A frequency `base^x` has |x ln base| < 16 roundings from x, and a few more. In a
/// blend of w and w / s, s <= 40, the errors of the weights are relative to w, which is up to s times the result.
void expect_frequencies(const RotaryFrequencies& actual, const data::Frequencies& expected) {
  const double roundings = 16 + 40 * 16;
  const at::Tensor values = at::tensor(expected.inv_freq, at::kDouble);
  expect_within(actual.inv_freq, values, values * roundings * unit_roundoff(at::kDouble));
  EXPECT_NEAR(actual.attention_factor, expected.attention_factor, 8 * unit_roundoff(at::kDouble));
  EXPECT_EQ(actual.inv_freq.scalar_type(), at::kDouble);
  EXPECT_TRUE(actual.inv_freq.is_cpu());
}

TEST(RotaryScalingValues, WithoutAPlanAreThoseOfThePaper) {
  expect_frequencies(posenc::rotary_frequencies(128, 10000, DefaultScaling()), data::kLlama2);
  expect_frequencies(posenc::rotary_frequencies(128, 1000000, DefaultScaling()), data::kQwen2Vl);
  expect_frequencies(posenc::rotary_frequencies(256, 10000, DefaultScaling()), data::kGemma3Sliding);
}

TEST(RotaryScalingValues, OfLinearScalingAreThoseOfGemma3) {
  expect_frequencies(posenc::rotary_frequencies(256, 1000000, LinearScaling{8}), data::kGemma3Full);
}

TEST(RotaryScalingValues, OfDynamicNtkFollowTheLength) {
  const DynamicNtkScaling scaling{2, 4096};
  for (const int64_t seq_len : {0, 1, 4096}) {
    expect_frequencies(posenc::rotary_frequencies(128, 10000, scaling, seq_len), data::kDynamicNtkAt4096);
  }
  expect_frequencies(posenc::rotary_frequencies(128, 10000, scaling, 4097), data::kDynamicNtkAt4097);
  expect_frequencies(
      posenc::rotary_frequencies(128, 10000, DynamicNtkScaling{2.5, 4096}, 16384), data::kDynamicNtkAt16384);
}

TEST(RotaryScalingValues, OfDynamicNtkMayCountLengthsInSteps) {
  const DynamicNtkScaling scaling{2.5, 4096, 4096};
  for (const int64_t seq_len : {12289, 15000, 16384}) {
    expect_frequencies(posenc::rotary_frequencies(128, 10000, scaling, seq_len), data::kDynamicNtkAt16384);
  }
}

TEST(RotaryScalingValues, OfStaticNtkAreThoseOfHunYuan) {
  expect_frequencies(posenc::rotary_frequencies(128, 10000, StaticNtkScaling{1000}), data::kStaticNtk);
}

TEST(RotaryScalingValues, OfYarnAreThoseOfItsModels) {
  expect_frequencies(posenc::rotary_frequencies(128, 1000000, yarn(4, 32768)), data::kQwen3Yarn);
  YarnScaling gpt_oss = yarn(32, 4096);
  gpt_oss.truncate = false;
  expect_frequencies(posenc::rotary_frequencies(64, 150000, gpt_oss), data::kYarnWithoutTruncation);
  YarnScaling deepseek = yarn(40, 4096);
  deepseek.mscale = deepseek.mscale_all_dim = 0.707;
  expect_frequencies(posenc::rotary_frequencies(64, 10000, deepseek), data::kDeepSeekV2);
  deepseek.mscale = deepseek.mscale_all_dim = 1;
  expect_frequencies(posenc::rotary_frequencies(64, 10000, deepseek), data::kDeepSeekV3);
}

TEST(RotaryScalingValues, OfYarnMayRampBeyondTheLastPair) {
  // In 131072 positions, pair 45.03 makes 32 turns and pair 69.1 would make one, but there are only 64 pairs.
  const at::Tensor actual = posenc::rotary_frequencies(128, 10000, yarn(4, 131072)).inv_freq;
  for (int64_t i = 0; i < 64; ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - 45) / (70 - 45), 0.0, 1.0);
    const double expected = std::pow(10000.0, -static_cast<double>(i) / 64) * (ramp / 4 + 1 - ramp);
    EXPECT_NEAR(actual[i].item<double>(), expected, expected * 16 * unit_roundoff(at::kDouble)) << i;
  }
}

TEST(RotaryScalingValues, OfYarnTakeEveryOption) {
  YarnScaling scaling = yarn(40, 4096);
  scaling.mscale = 1;
  scaling.mscale_all_dim = 0.707;
  expect_frequencies(posenc::rotary_frequencies(64, 10000, scaling), data::kYarnWithTwoMscales);
  scaling = yarn(4.5, 2048);
  scaling.beta_fast = 16;
  scaling.beta_slow = 2;
  scaling.attention_factor = 1.25;
  expect_frequencies(posenc::rotary_frequencies(32, 10000, scaling), data::kYarnWithAttentionFactor);
  expect_frequencies(posenc::rotary_frequencies(8, 10000, yarn(2, 4)), data::kYarnWithOneBoundary);
}

TEST(RotaryScalingValues, OfYarnMayHaveEqualBetas) {
  // Kimi-K2: c(1) = 64 ln(4096 / (2 pi)) / (2 ln 50000) = 19.17, so pair 19 is the last one unchanged and pair 20 the
  // first one divided by 32.
  YarnScaling scaling = yarn(32, 4096);
  scaling.beta_fast = scaling.beta_slow = 1;
  const at::Tensor plain = posenc::rotary_inv_freq(64, 50000);
  const at::Tensor divided = at::arange(32).ge(20);
  const at::Tensor expected = at::where(divided, plain / 32, plain);
  EXPECT_TRUE(at::allclose(posenc::rotary_frequencies(64, 50000, scaling).inv_freq, expected, 1e-14, 0));
}

TEST(RotaryScalingValues, OfYarnNeedBothMscales) {
  YarnScaling scaling = yarn(40, 4096);
  const double alone = posenc::rotary_frequencies(64, 10000, scaling).attention_factor;
  EXPECT_NEAR(alone, 0.1 * std::log(40.0) + 1, 8 * unit_roundoff(at::kDouble));
  scaling.mscale = 0.5;
  EXPECT_EQ(posenc::rotary_frequencies(64, 10000, scaling).attention_factor, alone);
  scaling.mscale_all_dim = 0;
  EXPECT_EQ(posenc::rotary_frequencies(64, 10000, scaling).attention_factor, alone);
  EXPECT_EQ(posenc::rotary_frequencies(64, 10000, yarn(1, 4096)).attention_factor, 1);
  EXPECT_EQ(posenc::rotary_frequencies(64, 10000, yarn(0.5, 4096)).attention_factor, 1);
}

TEST(RotaryScalingValues, OfLlama3AreThoseOfItsModels) {
  expect_frequencies(posenc::rotary_frequencies(128, 500000, Llama3Scaling()), data::kLlama3_1);
  expect_frequencies(posenc::rotary_frequencies(64, 500000, Llama3Scaling{32}), data::kLlama3_2_1B);
  expect_frequencies(posenc::rotary_frequencies(128, 500000, Llama3Scaling{16, 1, 1, 8192}), data::kLlama4);
}

TEST(RotaryScalingValues, OfLongRopeAreShortUpToTheOriginalLengthAndLongBeyond) {
  for (const int64_t seq_len : {0, 1, 4096}) {
    expect_frequencies(posenc::rotary_frequencies(96, 10000, phi3(), seq_len), data::kPhi3Short);
  }
  for (const int64_t seq_len : {4097, 131072}) {
    expect_frequencies(posenc::rotary_frequencies(96, 10000, phi3(), seq_len), data::kPhi3Long);
  }
}

TEST(RotaryScalingValues, OfLongRopeTakeTheFactorsGiven) {
  LongRopeScaling scaling = phi3();
  const auto attention_factor = [&](int64_t seq_len) {
    return posenc::rotary_frequencies(96, 10000, scaling, seq_len).attention_factor;
  };
  scaling.factor = 4;
  EXPECT_NEAR(attention_factor(1), std::sqrt(1 + std::log(4.0) / std::log(4096.0)), 8 * unit_roundoff(at::kDouble));
  scaling.factor = 1;
  EXPECT_EQ(attention_factor(1), 1);
  scaling.short_attention_factor = 1.5;
  scaling.long_attention_factor = 1.75;
  EXPECT_EQ(attention_factor(4096), 1.5);
  EXPECT_EQ(attention_factor(4097), 1.75);
  scaling.factor = std::nullopt;
  scaling.max_position_embeddings = std::nullopt;
  EXPECT_EQ(attention_factor(4096), 1.5);
}

TEST(RotaryScalingValues, OfTheProportionalPlanAreZeroBeyondItsPart) {
  expect_frequencies(posenc::rotary_frequencies(512, 1000000, ProportionalScaling{0.25}), data::kProportional);
  expect_frequencies(posenc::rotary_frequencies(64, 10000, ProportionalScaling{0.3, 2}), data::kProportionalWithFactor);
}

TEST(RotaryScalingValues, OfTheVariantAreThoseOfThePlanInIt) {
  const auto expect_same = [](const RotaryFrequencies& a, const RotaryFrequencies& b) {
    expect_same_bits(a.inv_freq, b.inv_freq);
    EXPECT_EQ(a.attention_factor, b.attention_factor);
  };
  const RotaryScaling in_variant = yarn(4, 32768);
  expect_same(posenc::rotary_frequencies(128, 1e6, in_variant), posenc::rotary_frequencies(128, 1e6, yarn(4, 32768)));
  const RotaryScaling with_length = DynamicNtkScaling{2, 4096};
  expect_same(
      posenc::rotary_frequencies(128, 1e4, with_length, 5000),
      posenc::rotary_frequencies(128, 1e4, DynamicNtkScaling{2, 4096}, 5000));
}

TEST(RotaryScalingValues, ShareTheirLengthWhereTheyAreTheSame) {
  const RotaryScaling dynamic = DynamicNtkScaling{2, 4096, 100};
  EXPECT_EQ(posenc::rotary_frequency_length(dynamic, 0), 4096);
  EXPECT_EQ(posenc::rotary_frequency_length(dynamic, 4096), 4096);
  EXPECT_EQ(posenc::rotary_frequency_length(dynamic, 4097), 4100);
  EXPECT_EQ(posenc::rotary_frequency_length(dynamic, 4100), 4100);
  EXPECT_EQ(posenc::rotary_frequency_length(dynamic, 4101), 4200);
  const RotaryScaling long_rope = phi3();
  EXPECT_EQ(posenc::rotary_frequency_length(long_rope, 4096), 4096);
  EXPECT_EQ(posenc::rotary_frequency_length(long_rope, 100000), 4097);
  EXPECT_EQ(posenc::rotary_frequency_length(yarn(4, 32768), 100000), 0);
  EXPECT_TRUE(posenc::depends_on_length(dynamic));
  EXPECT_TRUE(posenc::depends_on_length(long_rope));
  EXPECT_FALSE(posenc::depends_on_length(LinearScaling{8}));
}

TEST(RotaryScalingValues, XposScalesAreThoseOfThePaper) {
  const at::Tensor expected = at::tensor(data::kXpos.inv_freq, at::kDouble).view({5, 4});
  expect_within(posenc::rotary_xpos_scales(8, 5), expected, expected * 8 * unit_roundoff(at::kDouble));
  EXPECT_EQ(posenc::rotary_xpos_scales(8, 0).sizes(), at::IntArrayRef({0, 4}));
  // Doubling scale_base halves the exponent.
  const at::Tensor squared = posenc::rotary_xpos_scales(8, 5, 1024).square();
  expect_within(squared, expected, expected * 16 * unit_roundoff(at::kDouble));
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors

void expect_plan_error(const RotaryScaling& scaling, const std::vector<std::string>& parts, int64_t rotary_dim = 96) {
  expect_error([&] { posenc::rotary_frequencies(rotary_dim, 10000, scaling, 1); }, parts);
}

TEST(RotaryScalingErrors, NameThePlanAndTheFactor) {
  for (const double factor : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    const std::string got = "got " + c10::str(factor);
    expect_plan_error(LinearScaling{factor}, {"linear", "factor", got});
    expect_plan_error(DynamicNtkScaling{factor, 4096}, {"dynamic NTK", "factor", got});
    expect_plan_error(StaticNtkScaling{factor}, {"static NTK", "factor", got});
    expect_plan_error(yarn(factor, 4096), {"YaRN", "factor", got});
    expect_plan_error(Llama3Scaling{factor}, {"Llama 3", "factor", got});
    expect_plan_error(ProportionalScaling{0.5, factor}, {"proportional", "factor", got});
  }
}

TEST(RotaryScalingErrors, NameLengthsThatAreMissing) {
  expect_plan_error(DynamicNtkScaling{2}, {"dynamic NTK", "max_position_embeddings", "got 0"});
  expect_plan_error(DynamicNtkScaling{2, 4096, 0}, {"dynamic NTK", "seq_len_multiple", "got 0"});
  expect_plan_error(yarn(4, 0), {"YaRN", "original_max_position_embeddings", "got 0"});
  expect_plan_error(Llama3Scaling{8, 1, 4, -1}, {"Llama 3", "original_max_position_embeddings", "got -1"});
  LongRopeScaling long_rope = phi3();
  long_rope.original_max_position_embeddings = 0;
  expect_plan_error(long_rope, {"LongRoPE", "original_max_position_embeddings", "got 0"});
}

TEST(RotaryScalingErrors, NameNegativeLengths) {
  expect_error(
      [] { posenc::rotary_frequencies(8, 10000, DynamicNtkScaling{2, 4096}, -1); }, {"dynamic NTK", "seq_len", "-1"});
  expect_error(
      [] { posenc::rotary_frequency_length(DynamicNtkScaling{2, 4096}, -1); }, {"dynamic NTK", "seq_len", "-1"});
  expect_error([] { posenc::rotary_frequencies(96, 10000, phi3(), -1); }, {"LongRoPE", "seq_len", "-1"});
}

TEST(RotaryScalingErrors, NameLengthsThatCannotBeRounded) {
  expect_error(
      [] { posenc::rotary_frequency_length(DynamicNtkScaling{2, 4096, 0}, 5000); },
      {"dynamic NTK", "seq_len_multiple", "got 0"});
  expect_error(
      [] { posenc::rotary_frequency_length(DynamicNtkScaling{2, 0}, 5000); },
      {"dynamic NTK", "max_position_embeddings", "got 0"});
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();  // 2^63 - 1, a multiple of 7
  EXPECT_EQ(posenc::rotary_frequency_length(DynamicNtkScaling{2, 4096, 7}, kMost), kMost);
  EXPECT_EQ(posenc::rotary_frequency_length(DynamicNtkScaling{2, 4096, 7}, kMost - 6), kMost);
  EXPECT_EQ(posenc::rotary_frequency_length(DynamicNtkScaling{2, 4096, kMost}, 5000), kMost);
  expect_error(
      [] { posenc::rotary_frequency_length(DynamicNtkScaling{2, 4096, 256}, kMost); },
      {"dynamic NTK", "seq_len_multiple = 256", "2^63", "got 9223372036854775807"});
}

TEST(RotaryScalingErrors, NameFactorsOfTheScoresOfYarn) {
  for (const double bad : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    YarnScaling scaling = yarn(4, 4096);
    scaling.mscale = bad;
    expect_plan_error(scaling, {"YaRN", "finite mscale ", "got " + c10::str(bad)});
    scaling.mscale = 1;
    scaling.mscale_all_dim = bad;
    expect_plan_error(scaling, {"YaRN", "finite mscale_all_dim ", "got " + c10::str(bad)});
  }
}

TEST(RotaryScalingErrors, NameBoundariesOfYarn) {
  YarnScaling scaling = yarn(4, 4096);
  scaling.beta_slow = 0;
  expect_plan_error(scaling, {"YaRN", "beta_slow", "got 0"});
  scaling.beta_slow = 33;
  expect_plan_error(scaling, {"YaRN", "beta_fast", "beta_slow = 33", "got 32"});
  scaling = yarn(4, 4096);
  scaling.attention_factor = -1;
  expect_plan_error(scaling, {"YaRN", "attention_factor", "got -1"});
  expect_error([] { posenc::rotary_frequencies(8, 1, yarn(4, 4096)); }, {"YaRN", "base", "got 1"});
}

TEST(RotaryScalingErrors, NameBoundariesOfLlama3) {
  expect_plan_error(Llama3Scaling{8, 0, 4, 8192}, {"Llama 3", "low_freq_factor", "got 0"});
  expect_plan_error(Llama3Scaling{8, 4, 1, 8192}, {"Llama 3", "high_freq_factor", "low_freq_factor = 4", "got 1"});
}

TEST(RotaryScalingErrors, NameWhatLongRopeLacks) {
  LongRopeScaling scaling = phi3();
  scaling.short_factor.pop_back();
  expect_plan_error(scaling, {"LongRoPE", "48", "short_factor", "got 47"});
  scaling = phi3();
  scaling.long_factor.clear();
  expect_plan_error(scaling, {"LongRoPE", "48", "long_factor", "got 0"});
  scaling = phi3();
  scaling.long_factor[7] = 0;
  expect_plan_error(scaling, {"LongRoPE", "long_factor", "got 0"});
  scaling = phi3();
  scaling.max_position_embeddings = std::nullopt;
  expect_plan_error(scaling, {"LongRoPE", "factor", "max_position_embeddings", "none"});
  scaling.factor = -2;
  expect_plan_error(scaling, {"LongRoPE", "factor", "got -2"});
  scaling = phi3();
  scaling.long_attention_factor = 0;
  expect_plan_error(scaling, {"LongRoPE", "long_attention_factor", "got 0"});
}

TEST(RotaryScalingErrors, NamePartsBeyondTheHead) {
  expect_plan_error(ProportionalScaling{1.5}, {"proportional", "partial_rotary_factor", "got 1.5"});
  expect_plan_error(ProportionalScaling{-0.5}, {"proportional", "partial_rotary_factor", "got -0.5"});
}

TEST(RotaryScalingErrors, NameWidthsThatNtkCannotStretch) {
  expect_plan_error(DynamicNtkScaling{2, 4096}, {"dynamic NTK", "rotary_dim", "got 2"}, 2);
  expect_plan_error(StaticNtkScaling{2}, {"static NTK", "rotary_dim", "got 2"}, 2);
}

TEST(RotaryScalingErrors, NameBadArgumentsOfXpos) {
  expect_error([] { posenc::rotary_xpos_scales(7, 4); }, {"rotary_dim", "7"});
  expect_error([] { posenc::rotary_xpos_scales(8, -1); }, {"length", "-1"});
  expect_error([] { posenc::rotary_xpos_scales(8, 4, 0); }, {"scale_base", "got 0"});
}

}  // namespace
}  // namespace posenc::test
