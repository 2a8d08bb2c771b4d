// RotaryEmbeddingOptions::from_hf_config on the relevant fields of published models.
#include "hf_config_support.h"
#include "support.h"

#include <posenc/modules/rotary_embedding.h>

#include <c10/util/Exception.h>

#include <cstdio>
#include <fstream>

namespace posenc::test {
namespace {

using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

/// Expected options; fields that a test does not set have the default values of such configurations.
struct Expected {
  int64_t head_dim = 128;
  std::optional<int64_t> rotary_dim = std::nullopt;
  double base = 10000;
  int64_t max_position_embeddings = 2048;
  bool interleaved = false;
  RotaryScaling scaling = DefaultScaling();
  std::vector<int64_t> sections = {};
  bool interleaved_sections = false;
};

void expect_options(const RotaryEmbeddingOptions& options, const Expected& expected) {
  EXPECT_EQ(options.head_dim(), expected.head_dim);
  EXPECT_EQ(options.rotary_dim(), expected.rotary_dim);
  EXPECT_EQ(options.base(), expected.base);
  EXPECT_EQ(options.max_position_embeddings(), expected.max_position_embeddings);
  EXPECT_EQ(options.interleaved(), expected.interleaved);
  EXPECT_TRUE(options.scaling() == expected.scaling)
      << posenc::to_string(options.scaling()) << " instead of " << posenc::to_string(expected.scaling);
  EXPECT_EQ(options.sections(), expected.sections);
  EXPECT_EQ(options.interleaved_sections(), expected.interleaved_sections);
  EXPECT_NO_THROW(RotaryEmbedding{options});
}

// ---------------------------------------------------------------------------------------------------------------------
// Models

TEST(RotaryEmbeddingHfConfig, OfLlama2) {
  const auto options = from(R"({"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
      "max_position_embeddings": 4096, "rope_scaling": null})");
  Expected expected;
  expected.max_position_embeddings = 4096;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfLlama3) {
  const auto options = from(R"({"model_type": "llama", "hidden_size": 8192, "num_attention_heads": 64,
      "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0})");
  Expected expected;
  expected.base = 500000;
  expected.max_position_embeddings = 8192;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfLlama31) {
  const auto options = from(R"({"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32,
      "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0,
      "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
      "rope_type": "llama3"}})");
  Expected expected;
  expected.base = 500000;
  expected.max_position_embeddings = 131072;
  expected.scaling = Llama3Scaling();
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfLlama4) {
  const auto options = from(R"({"model_type": "llama4", "text_config": {"model_type": "llama4_text",
      "hidden_size": 5120, "num_attention_heads": 40, "head_dim": 128, "max_position_embeddings": 10485760,
      "rope_theta": 500000.0, "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
      "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
      "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408, "num_attention_heads": 16}})");
  Expected expected;
  expected.base = 500000;
  expected.max_position_embeddings = 131072;  // limited: 10485760 rows are not allocated up front
  expected.interleaved = true;
  expected.scaling = Llama3Scaling{16, 1, 1, 8192};
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfQwen2) {
  const auto options = from(R"({"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28,
      "max_position_embeddings": 32768, "rope_theta": 1000000.0})");
  Expected expected;
  expected.base = 1000000;
  expected.max_position_embeddings = 32768;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfQwen3WithYarn) {
  const auto options = from(R"({"model_type": "qwen3", "hidden_size": 2560, "num_attention_heads": 32,
      "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": {"rope_type": "yarn",
      "factor": 4.0, "original_max_position_embeddings": 32768}})");
  YarnScaling yarn;
  yarn.factor = 4;
  yarn.original_max_position_embeddings = 32768;
  Expected expected;
  expected.base = 1000000;
  expected.max_position_embeddings = 40960;
  expected.scaling = yarn;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfQwen2Vl) {
  for (const char* type : {"mrope", "default"}) {
    const auto options = from(
        std::string(R"({"model_type": "qwen2_vl", "hidden_size": 3584, "num_attention_heads": 28,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rope_scaling": {"type": ")") +
        type + R"(", "mrope_section": [16, 24, 24]}, "vision_config": {"hidden_size": 3584}})");
    Expected expected;
    expected.base = 1000000;
    expected.max_position_embeddings = 32768;
    expected.sections = {16, 24, 24};
    expect_options(options, expected);
  }
}

TEST(RotaryEmbeddingHfConfig, OfQwen3Vl) {
  const auto options = from(R"({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text",
      "head_dim": 128, "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 262144,
      "rope_theta": 5000000, "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20],
      "rope_type": "default"}}})");
  Expected expected;
  expected.base = 5000000;
  expected.max_position_embeddings = 131072;
  expected.sections = {24, 20, 20};
  expected.interleaved_sections = true;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfPhi3WithLongRope) {
  for (const char* name : {"longrope", "su"}) {
    const auto options = from(
        std::string(R"({"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 2, "rope_theta": 10000.0,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rope_scaling": {"type": ")") +
        name + R"(", "short_factor": [1.0, 1.1, 1.25, 1.5], "long_factor": [1, 4, 16, 64.5]}})");
    LongRopeScaling longrope;
    longrope.short_factor = {1, 1.1, 1.25, 1.5};
    longrope.long_factor = {1, 4, 16, 64.5};
    longrope.original_max_position_embeddings = 4096;
    longrope.max_position_embeddings = 131072;
    Expected expected;
    expected.head_dim = 8;
    expected.max_position_embeddings = 131072;
    expected.scaling = longrope;
    expect_options(options, expected);
  }
}

TEST(RotaryEmbeddingHfConfig, OfPhi4WithAPartOfTheHead) {
  const auto options = from(R"({"model_type": "phi3", "hidden_size": 16, "num_attention_heads": 2,
      "partial_rotary_factor": 0.75, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
      "rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 2, 3]}})");
  EXPECT_EQ(options.rotary_dim(), 6);
  EXPECT_NO_THROW(RotaryEmbedding{options});
}

TEST(RotaryEmbeddingHfConfig, OfPhiMoeWithItsMscales) {
  const auto options = from(R"({"model_type": "phimoe", "head_dim": 4, "max_position_embeddings": 131072,
      "original_max_position_embeddings": 4096, "rope_scaling": {"type": "longrope", "short_factor": [1, 1],
      "long_factor": [1, 2], "short_mscale": 1.243, "long_mscale": 1.25}})");
  const auto& longrope = std::get<LongRopeScaling>(options.scaling());
  EXPECT_EQ(longrope.short_attention_factor, 1.243);
  EXPECT_EQ(longrope.long_attention_factor, 1.25);
}

TEST(RotaryEmbeddingHfConfig, OfGptJ) {
  const auto options =
      from(R"({"model_type": "gptj", "n_embd": 4096, "n_head": 16, "n_positions": 2048, "rotary_dim": 64})");
  Expected expected;
  expected.head_dim = 256;
  expected.rotary_dim = 64;
  expected.interleaved = true;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfGptNeoX) {
  const auto options = from(R"({"model_type": "gpt_neox", "hidden_size": 6144, "num_attention_heads": 64,
      "max_position_embeddings": 2048, "rotary_emb_base": 20000, "rotary_pct": 0.25})");
  Expected expected;
  expected.head_dim = 96;
  expected.rotary_dim = 24;
  expected.base = 20000;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfGemma2) {
  const auto options = from(R"({"model_type": "gemma2", "hidden_size": 2304, "num_attention_heads": 8,
      "head_dim": 256, "max_position_embeddings": 8192, "rope_theta": 10000.0})");
  Expected expected;
  expected.head_dim = 256;
  expected.max_position_embeddings = 8192;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfGemma3AsPublished) {
  // Most fields are missing, so the defaults of the model type apply.
  const char* const file = R"({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text",
      "hidden_size": 2560, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}})";
  Expected full;
  full.head_dim = 256;
  full.max_position_embeddings = 131072;
  full.base = 1000000;
  full.scaling = LinearScaling{8};
  expect_options(from(file, "full_attention"), full);
  Expected sliding;
  sliding.head_dim = 256;
  sliding.max_position_embeddings = 131072;
  expect_options(from(file, "sliding_attention"), sliding);
}

TEST(RotaryEmbeddingHfConfig, OfGemma3AsWrittenByTransformers5) {
  const char* const file = R"({"model_type": "gemma3_text", "head_dim": 256, "max_position_embeddings": 131072,
      "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
      "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}})";
  Expected full;
  full.head_dim = 256;
  full.max_position_embeddings = 131072;
  full.base = 1000000;
  full.scaling = LinearScaling{8};
  expect_options(from(file, "full_attention"), full);
  Expected sliding;
  sliding.head_dim = 256;
  sliding.max_position_embeddings = 131072;
  expect_options(from(file, "sliding_attention"), sliding);
}

TEST(RotaryEmbeddingHfConfig, OfGemma4WithTheProportionalPlan) {
  const char* const file = R"({"model_type": "gemma4_text", "head_dim": 256, "global_head_dim": 512,
      "max_position_embeddings": 131072, "rope_parameters": {"full_attention": {"rope_type": "proportional",
      "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}, "sliding_attention": {"rope_type": "default",
      "rope_theta": 10000.0}}})";
  Expected full;
  full.head_dim = 512;
  full.max_position_embeddings = 131072;
  full.base = 1000000;
  full.scaling = ProportionalScaling{0.25};
  expect_options(from(file, "full_attention"), full);
  EXPECT_EQ(from(file, "sliding_attention").head_dim(), 256);
}

TEST(RotaryEmbeddingHfConfig, OfDeepSeekV3) {
  const auto options = from(R"({"model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128,
      "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
      "rope_theta": 10000, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
      "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"}})");
  YarnScaling yarn;
  yarn.factor = 40;
  yarn.original_max_position_embeddings = 4096;
  yarn.mscale = yarn.mscale_all_dim = 1;
  Expected expected;
  expected.head_dim = 64;
  expected.max_position_embeddings = 131072;
  expected.interleaved = true;
  expected.scaling = yarn;
  expect_options(options, expected);
}

TEST(RotaryEmbeddingHfConfig, OfGptOss) {
  const auto options = from(R"({"model_type": "gpt_oss", "head_dim": 64, "hidden_size": 2880,
      "num_attention_heads": 64, "max_position_embeddings": 131072, "rope_theta": 150000,
      "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
      "rope_type": "yarn", "truncate": false}})");
  EXPECT_FALSE(std::get<YarnScaling>(options.scaling()).truncate);
  EXPECT_EQ(options.base(), 150000);
}

TEST(RotaryEmbeddingHfConfig, OfPixtral) {
  const auto options = from(R"({"model_type": "llava", "text_config": {"model_type": "mistral", "hidden_size": 5120,
      "head_dim": 128, "num_attention_heads": 32, "max_position_embeddings": 1024000, "rope_theta": 1000000000.0},
      "vision_config": {"model_type": "pixtral", "head_dim": 64, "rope_theta": 10000.0}})");
  Expected expected;
  expected.base = 1e9;
  expected.max_position_embeddings = 131072;
  expect_options(options, expected);
  // The vision part is read as a separate configuration.
  const auto vision = from(R"({"model_type": "pixtral", "hidden_size": 1024, "head_dim": 64, "image_size": 1024,
      "rope_theta": 10000.0})");
  EXPECT_EQ(vision.head_dim(), 64);
  EXPECT_EQ(vision.base(), 10000);
  EXPECT_EQ(vision.pair_axes().size(), 32U);
}

TEST(RotaryEmbeddingHfConfig, OfHunYuanWithAFixedAlpha) {
  const auto options = from(R"({"model_type": "hunyuan_v1_dense", "head_dim": 128, "max_position_embeddings": 32768,
      "rope_theta": 10000.0, "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}})");
  Expected expected;
  expected.max_position_embeddings = 32768;
  expected.scaling = StaticNtkScaling{1000};
  expect_options(options, expected);
}

/// An alpha of 0 means no alpha.
TEST(RotaryEmbeddingHfConfig, OfHunYuanWithoutAlpha) {
  const auto options = from(R"({"model_type": "hunyuan_v1_dense", "head_dim": 128, "max_position_embeddings": 32768,
      "rope_theta": 10000.0, "rope_scaling": {"alpha": 0, "factor": 2.0, "type": "dynamic"}})");
  Expected expected;
  expected.max_position_embeddings = 32768;
  expected.scaling = DynamicNtkScaling{2, 32768};
  expect_options(options, expected);
}

// ---------------------------------------------------------------------------------------------------------------------
// Fields

TEST(RotaryEmbeddingHfConfig, TakesDynamicNtkFromTheLengthOfTheModel) {
  const auto options = from(with(R"({"type": "dynamic", "factor": 2})"));
  EXPECT_TRUE(options.scaling() == RotaryScaling(DynamicNtkScaling{2, 8192}));
}

TEST(RotaryEmbeddingHfConfig, TakesTheThetaOfRopeParametersFirst) {
  EXPECT_EQ(from(R"({"head_dim": 64, "rope_theta": 7, "rope_parameters": {"rope_theta": 5}})").base(), 5);
  EXPECT_EQ(from(R"({"head_dim": 64, "rope_theta": 7, "rope_parameters": {"rope_type": "default"}})").base(), 7);
}

TEST(RotaryEmbeddingHfConfig, TakesThePartOfRopeParametersFirst) {
  const char* const file = R"({"head_dim": 64, "partial_rotary_factor": 0.5,
      "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}})";
  EXPECT_EQ(from(file).rotary_dim(), 16);
  EXPECT_EQ(from(R"({"head_dim": 64, "partial_rotary_factor": 0.5})").rotary_dim(), 32);
  EXPECT_EQ(from(R"({"model_type": "glm", "head_dim": 64})").rotary_dim(), 32);
}

TEST(RotaryEmbeddingHfConfig, DerivesTheFactorOfYarnFromTheLengths) {
  const auto options = from(with(R"({"type": "yarn", "original_max_position_embeddings": 2048, "factor": null})"));
  EXPECT_EQ(std::get<YarnScaling>(options.scaling()).factor, 4);
}

TEST(RotaryEmbeddingHfConfig, TakesTheOriginalLengthBesideThePlanFirst) {
  const auto original = [](const std::string& plan, const std::string& fields) {
    return std::get<YarnScaling>(from(with(plan, fields)).scaling()).original_max_position_embeddings;
  };
  const std::string inside = R"({"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024})";
  EXPECT_EQ(original(inside, ""), 1024);
  EXPECT_EQ(original(inside, R"(, "original_max_position_embeddings": 2048)"), 2048);
  EXPECT_EQ(original(R"({"type": "yarn", "factor": 4})", ""), 8192);
}

TEST(RotaryEmbeddingHfConfig, TakesThePairingOfTheFileFirst) {
  EXPECT_FALSE(
      from(R"({"model_type": "deepseek_v3", "qk_rope_head_dim": 64, "rope_interleave": false})").interleaved());
  EXPECT_TRUE(from(R"({"model_type": "cohere", "head_dim": 64})").interleaved());
  EXPECT_FALSE(from(R"({"model_type": "never heard of", "head_dim": 64, "rope_theta": 10000})").interleaved());
  EXPECT_TRUE(from(R"({"model_type": "never heard of", "head_dim": 64, "rope_interleave": true})").interleaved());
}

TEST(RotaryEmbeddingHfConfig, TakesALayerTypeOfLayersThatAreAlike) {
  const char* const file =
      R"({"model_type": "llama", "head_dim": 64, "layer_types": ["sliding_attention", "full_attention"]})";
  EXPECT_EQ(from(file, "full_attention").head_dim(), 64);
  EXPECT_EQ(from(file).head_dim(), 64);
}

TEST(RotaryEmbeddingHfConfig, IsReadFromAFile) {
  const std::string path = ::testing::TempDir() + "posenc_hf_config.json";
  std::ofstream(path) << R"(  {"head_dim": 96, "rope_theta": 500000})";
  const auto options = from(path);
  std::remove(path.c_str());
  EXPECT_EQ(options.head_dim(), 96);
  EXPECT_EQ(options.base(), 500000);
}

}  // namespace
}  // namespace posenc::test
