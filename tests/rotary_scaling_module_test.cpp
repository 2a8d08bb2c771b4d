#include "rotary_scaling_support.h"

#include <posenc/frequencies.h>
#include <posenc/logging.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <cmath>
#include <sstream>

// Scalings of posenc/frequencies.h in the module RotaryEmbedding.
namespace posenc::test {
namespace {

using posenc::DefaultScaling;
using posenc::DynamicNtkScaling;
using posenc::LinearScaling;
using posenc::Llama3Scaling;
using posenc::LongRopeScaling;
using posenc::ProportionalScaling;
using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;
using posenc::RotaryFrequencies;
using posenc::RotaryScaling;
using posenc::StaticNtkScaling;
using posenc::YarnScaling;

constexpr int64_t kHeadDim = 16;

class RotaryScalingModule : public DeviceTest {
 protected:
  at::Tensor random(int64_t tokens) const { return random_tensor({1, tokens, 2, kHeadDim}, {GetParam(), at::kFloat}); }

  /// Expected result of the module: the operator with cos and sin of the frequencies of `scaling` for `seq_len`.
  at::Tensor expected(
      const at::Tensor& x,
      const RotaryScaling& scaling,
      int64_t seq_len,
      const std::optional<at::Tensor>& positions = std::nullopt) const {
    const RotaryFrequencies frequencies = posenc::rotary_frequencies(kHeadDim, 10000, scaling, seq_len);
    const auto [cos, sin] =
        posenc::rotary_tables(frequencies.inv_freq, seq_len, at::kFloat, frequencies.attention_factor);
    return posenc::rotary_embedding(x, cos.to(device()), sin.to(device()), positions);
  }

  static RotaryEmbeddingOptions options(const RotaryScaling& scaling) {
    return RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8).scaling(scaling);
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryScalingModule, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryScalingModule, ::testing::Values(at::kCUDA), device_name);

LongRopeScaling short_and_long() {
  LongRopeScaling scaling;
  scaling.short_factor = {1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5};
  scaling.long_factor = {2, 4, 8, 16, 32, 64, 128, 256};
  scaling.original_max_position_embeddings = 16;
  scaling.max_position_embeddings = 64;
  return scaling;
}

/// Number of tables that `action` builds, according to the log.
int tables_built(const std::function<void()>& action) {
  const LogLevel before = log_level();
  set_log_level(LogLevel::debug);
  ::testing::internal::CaptureStderr();
  action();
  const std::string text = ::testing::internal::GetCapturedStderr();
  set_log_level(before);
  const std::string line = "RotaryEmbedding: built";
  int count = 0;
  for (size_t at = text.find(line); at != std::string::npos; at = text.find(line, at + 1)) {
    ++count;
  }
  return count;
}

TEST_P(RotaryScalingModule, RotatesByTheFrequenciesOfEveryPlan) {
  const RotaryScaling plans[] = {
      DefaultScaling(), LinearScaling{4}, DynamicNtkScaling{2, 16}, StaticNtkScaling{3},
      yarn(4, 16),      Llama3Scaling(),  short_and_long(),         ProportionalScaling{0.5, 2}};
  for (const RotaryScaling& scaling : plans) {
    SCOPED_TRACE(posenc::to_string(scaling));
    RotaryEmbedding rope(options(scaling));
    for (const int64_t tokens : {5, 16, 17, 40}) {
      const at::Tensor x = random(tokens);
      expect_same_bits(rope->rotate(x), expected(x, scaling, tokens));
      const auto [q, k] = rope->forward(x, x.narrow(2, 0, 1));
      expect_same_bits(q, expected(x, scaling, tokens));
      expect_same_bits(k, q.narrow(2, 0, 1).contiguous());
    }
  }
}

TEST_P(RotaryScalingModule, TakesTheLengthFromItsArgument) {
  for (const RotaryScaling& scaling : {RotaryScaling(DynamicNtkScaling{2, 16}), RotaryScaling(short_and_long())}) {
    RotaryEmbedding rope(options(scaling));
    const at::Tensor x = random(3);
    const at::Tensor p = at::tensor({4, 0, 11}, at::kLong).to(device());
    for (const int64_t seq_len : {12, 17, 40, 16}) {
      expect_same_bits(rope->rotate(x, p, seq_len), expected(x, scaling, seq_len, p));
      expect_same_bits(std::get<0>(rope->forward(x, x, p, seq_len)), expected(x, scaling, seq_len, p));
      expect_same_bits(rope->rotate(x, std::nullopt, seq_len), expected(x, scaling, seq_len));
    }
  }
}

TEST_P(RotaryScalingModule, GivesTablesAsManyRowsAsTheLength) {
  RotaryEmbedding rope(options(DefaultScaling()));
  const at::Tensor x = random(3);
  const at::Tensor p = at::tensor({3000, 0, 11}, at::kLong).to(device());
  expect_same_bits(rope->rotate(x, p, 3001), expected(x, DefaultScaling(), 3001, p));
}

TEST_P(RotaryScalingModule, RejectsLengthsThatAreTooSmall) {
  RotaryEmbedding rope(options(DynamicNtkScaling{2, 16}));
  expect_error([&] { rope->rotate(random(5), std::nullopt, 4); }, {"seq_len", "5", "got 4"});
  expect_error([&] { rope->rotate(random(5), std::nullopt, int64_t{1} << 40); }, {"seq_len", "2^31"});
  expect_error([&] { rope->forward(random(5), random(5), std::nullopt, -1); }, {"seq_len", "got -1"});
}

TEST_P(RotaryScalingModule, BuildsNothingAgainWhenNothingChanged) {
  for (const RotaryScaling& scaling : {RotaryScaling(DynamicNtkScaling{2, 16}), RotaryScaling(short_and_long())}) {
    RotaryEmbedding rope(options(scaling));
    const at::Tensor x = random(40);
    const auto step = [&] {
      rope->rotate(x);
      rope->rotate(x.narrow(1, 0, 10));
    };
    EXPECT_GE(tables_built(step), 2);
    EXPECT_EQ(tables_built(step), 0);
  }
}

TEST_P(RotaryScalingModule, KeepsTheTablesOfTheLastFourLengths) {
  RotaryEmbedding rope(options(DynamicNtkScaling{2, 16}));
  const at::Tensor x = random(40);
  for (const int64_t tokens : {40, 20, 21, 22}) {
    rope->rotate(x.narrow(1, 0, tokens));
  }
  EXPECT_EQ(rope->table_length(device()), 40);
  EXPECT_EQ(tables_built([&] { rope->rotate(x); }), 0);
  for (const int64_t tokens : {23, 24, 25, 26, 10}) {
    rope->rotate(x.narrow(1, 0, tokens));
  }
  EXPECT_EQ(rope->table_length(device()), 26);
  expect_same_bits(rope->rotate(x), expected(x, DynamicNtkScaling{2, 16}, 40));
}

TEST_P(RotaryScalingModule, KeepsReservedTablesWhateverComes) {
  RotaryEmbedding rope(options(DynamicNtkScaling{2, 16}));
  rope->reserve(60, device());
  const at::Tensor x = random(40);
  for (int64_t tokens = 20; tokens < 40; ++tokens) {
    rope->rotate(x.narrow(1, 0, tokens));
  }
  EXPECT_EQ(rope->table_length(device()), 60);
  const at::Tensor longer = random(60);
  EXPECT_EQ(tables_built([&] { rope->rotate(longer); }), 0);
}

TEST_P(RotaryScalingModule, CountsNoReservedTablesAmongTheLastFourLengths) {
  RotaryEmbedding rope(options(DynamicNtkScaling{2, 16}));
  const at::Tensor x = random(40);
  const auto rotate = [&](int64_t tokens) { rope->rotate(x.narrow(1, 0, tokens)); };
  for (int64_t tokens = 30; tokens < 35; ++tokens) {
    rope->reserve(tokens, device());
  }
  rotate(23);
  for (int64_t tokens = 30; tokens < 35; ++tokens) {
    rotate(tokens);
  }
  rotate(24);
  EXPECT_EQ(tables_built([&] { rotate(23); }), 0);
}

TEST_P(RotaryScalingModule, TakesNewTablesForANewPlanAfterReset) {
  RotaryEmbedding rope(options(LinearScaling{4}));
  const at::Tensor x = random(5);
  rope->rotate(x);
  rope->options.scaling(LinearScaling{2});
  rope->reset();
  expect_same_bits(rope->rotate(x), expected(x, LinearScaling{2}, 5));
  const auto copy = std::dynamic_pointer_cast<posenc::RotaryEmbeddingImpl>(rope->clone());
  EXPECT_EQ(tables_built([&] { expect_same_bits(copy->rotate(x), rope->rotate(x)); }), 0);
}

TEST_P(RotaryScalingModule, StartsLearnableFrequenciesWithThePlan) {
  const YarnScaling scaling = yarn(4, 16);
  RotaryEmbedding rope(options(scaling).learnable_frequencies(true));
  rope->to(device());
  const RotaryFrequencies start = posenc::rotary_frequencies(kHeadDim, 10000, scaling);
  expect_same_bits(rope->inv_freq, start.inv_freq.to(at::kFloat));
  const at::Tensor x = random(5);
  const auto [cos, sin] = posenc::rotary_tables(rope->inv_freq.detach(), 5, at::kFloat, start.attention_factor);
  expect_same_bits(rope->rotate(x), posenc::rotary_embedding(x, cos, sin));
}

TEST(RotaryScalingOptions, OfLearnableFrequenciesDoNotDependOnTheLength) {
  expect_error(
      [] { RotaryEmbedding(RotaryEmbeddingOptions(16).learnable_frequencies(true).scaling(DynamicNtkScaling{2, 16})); },
      {"learnable", "length", "dynamic"});
}

TEST(RotaryScalingOptions, AreCheckedByTheModule) {
  expect_error([] { RotaryEmbedding(RotaryEmbeddingOptions(16).scaling(LinearScaling{-1})); }, {"linear", "-1"});
  expect_error([] { RotaryEmbedding(RotaryEmbeddingOptions(16).scaling(phi3())); }, {"LongRoPE", "8", "48"});
}

TEST(RotaryScalingOptions, ArePrinted) {
  YarnScaling scaling = yarn(4, 32768);
  scaling.mscale = 0.5;
  std::ostringstream stream;
  stream << *RotaryEmbedding(RotaryEmbeddingOptions(64).scaling(scaling));
  EXPECT_NE(
      stream.str().find(
          "scaling=yarn(factor=4, original_max_position_embeddings=32768, beta_fast=32, beta_slow=1, truncate=true, "
          "mscale=0.5)"),
      std::string::npos)
      << stream.str();
  EXPECT_EQ(posenc::to_string(DefaultScaling()), "default");
  EXPECT_EQ(posenc::to_string(LinearScaling{2.5}), "linear(factor=2.5)");
  EXPECT_EQ(
      posenc::to_string(DynamicNtkScaling{2, 4096}),
      "dynamic(factor=2, max_position_embeddings=4096, seq_len_multiple=1)");
}

TEST(RotaryScalingHostPositions, SayTheLength) {
  const RotaryScaling scaling = DynamicNtkScaling{2, 16};
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).scaling(scaling));
  const at::Tensor x = at::randn({1, 3, 2, kHeadDim});
  const at::Tensor p = at::tensor({4, 29, 11}, at::kLong);
  expect_same_bits(rope->rotate(x, p), rope->rotate(x, p, 30));
  expect_error([&] { rope->rotate(x, p, 29); }, {"seq_len", "30", "got 29"});
}

class RotaryScalingDevicePositions : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cuda, RotaryScalingDevicePositions, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryScalingDevicePositions, NeedTheLengthFromTheCaller) {
  const at::Tensor x = at::randn({1, 3, 2, kHeadDim}).to(device());
  const at::Tensor p = at::tensor({4, 0, 11}, at::kLong).to(device());
  for (const RotaryScaling& scaling : {RotaryScaling(DynamicNtkScaling{2, 16}), RotaryScaling(short_and_long())}) {
    RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).scaling(scaling));
    expect_error([&] { rope->rotate(x, p); }, {"seq_len", "none"});
    EXPECT_NO_THROW(rope->rotate(x, p, 12));
  }
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).scaling(LinearScaling{2}));
  EXPECT_NO_THROW(rope->rotate(x, p));
}

// ---------------------------------------------------------------------------------------------------------------------
// Accuracy at large positions

class RotaryEmbeddingAccuracy : public TargetTest {};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingAccuracy, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingAccuracy, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

/// bfloat16 tables are wrong from position 257 on, float32 angles from some ten thousands on. `rounding_bound` allows
/// one rounding to the dtype of the output, and the arithmetic in the dtype of the tables. Table entries also have the
/// errors of their rounding and of an angle in float64.
TEST_P(RotaryEmbeddingAccuracy, IsOneRoundingAtPositionsUpToAMillion) {
  const std::vector<int64_t> rows = {255, 257, 32'768, 1'048'575};
  const auto tokens = static_cast<int64_t>(rows.size());
  const at::Tensor positions = at::tensor(rows, at::kLong).to(device());
  const at::Tensor x = random_tensor({1, tokens, 2, kHeadDim}, GetParam());
  for (const RotaryScaling& scaling : {RotaryScaling(DefaultScaling()), RotaryScaling(yarn(32, 32768))}) {
    SCOPED_TRACE(posenc::to_string(scaling));
    RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).base(500000).scaling(scaling));
    const at::Tensor actual = rope->rotate(x, positions, 1 << 20);

    const RotaryFrequencies frequencies = posenc::rotary_frequencies(kHeadDim, 500000, scaling);
    RotaryInputs in;
    in.cos = at::empty({tokens, kHeadDim / 2}, at::kDouble);
    in.sin = at::empty_like(in.cos);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < kHeadDim / 2; ++i) {
        const long double angle = static_cast<long double>(rows[static_cast<size_t>(t)]) *
            static_cast<long double>(frequencies.inv_freq[i].item<double>());
        in.cos[t][i].fill_(static_cast<double>(frequencies.attention_factor * std::cos(angle)));
        in.sin[t][i].fill_(static_cast<double>(frequencies.attention_factor * std::sin(angle)));
      }
    }
    const at::Tensor on_cpu = x.cpu();
    const double of_angle = static_cast<double>(rows.back()) * unit_roundoff(at::kDouble);
    const double of_entry = frequencies.attention_factor * (unit_roundoff(table_dtype(dtype())) + 4 * of_angle);
    const at::Tensor largest = on_cpu.to(at::kDouble).abs().amax(-1, /*keepdim=*/true);
    expect_within(actual, scalar_rotation(in, on_cpu), rounding_bound(in, on_cpu) + largest * 2 * of_entry);
  }
}

}  // namespace
}  // namespace posenc::test
