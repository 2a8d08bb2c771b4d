// Errors of RotaryEmbeddingOptions::from_hf_config and their messages.
#include "hf_config_support.h"
#include "support.h"

#include <posenc/modules/rotary_embedding.h>

#include <c10/util/Exception.h>

#include <cstdio>
#include <fstream>

namespace posenc::test {
namespace {

using posenc::RotaryEmbeddingOptions;

#if POSENC_JSON

TEST(RotaryEmbeddingHfConfigErrors, NameTheTypeAndThoseThatAreSupported) {
  expect_error(
      [] { from(with(R"({"rope_type": "telepathic", "factor": 2})")); },
      {"telepathic", "default", "linear", "dynamic", "yarn", "llama3", "longrope", "su", "proportional", "mrope"});
}

TEST(RotaryEmbeddingHfConfigErrors, NameFilesThatCannotBeRead) {
  expect_error([] { from("/no/such/config.json"); }, {"file", "/no/such/config.json"});
  expect_error([] { from(""); }, {"file", "''"});
}

TEST(RotaryEmbeddingHfConfigErrors, SayWhereJsonIsMalformed) {
  expect_error([] { from(R"({"head_dim": 64,)"); }, {"JSON", "line 1"});
  const std::string path = ::testing::TempDir() + "posenc_hf_config_list.json";
  std::ofstream(path) << "[1, 2]";
  expect_error([&] { from(path); }, {"config.json", "object", "array"});
  std::remove(path.c_str());
}

TEST(RotaryEmbeddingHfConfigErrors, NameMissingFields) {
  expect_error([] { from(R"({"rope_theta": 7})"); }, {"head_dim", "hidden_size", "num_attention_heads"});
  expect_error(
      [] { from(R"({"hidden_size": 64, "rope_theta": 7})"); }, {"head_dim", "hidden_size", "num_attention_heads"});
  expect_error([] { from(with(R"({"type": "linear"})")); }, {"factor", "rope_scaling", "linear", "none"});
  expect_error([] { from(with(R"({"type": "dynamic"})")); }, {"factor", "dynamic", "none"});
  expect_error(
      [] { from(R"({"head_dim": 64, "rope_scaling": {"type": "dynamic", "factor": 2}})"); },
      {"max_position_embeddings", "dynamic", "none"});
  expect_error(
      [] { from(R"({"head_dim": 64, "rope_scaling": {"type": "yarn", "factor": 2}})"); },
      {"original_max_position_embeddings", "yarn", "none"});
  expect_error(
      [] { from(with(R"({"type": "llama3", "factor": 8, "low_freq_factor": 1})")); },
      {"high_freq_factor", "llama3", "none"});
  expect_error([] { from(with(R"({"type": "longrope", "short_factor": [1]})")); }, {"long_factor", "longrope", "none"});
}

TEST(RotaryEmbeddingHfConfigErrors, NameFieldsOfTheWrongType) {
  expect_error([] { from(R"({"model_type": "llama", "head_dim": "64"})"); }, {"head_dim", "an integer", "\"64\""});
  expect_error([] { from(R"({"model_type": "llama", "head_dim": 64.5})"); }, {"head_dim", "an integer", "64.5"});
  expect_error([] { from(R"({"head_dim": 64, "rope_theta": "1"})"); }, {"rope_theta", "a number", "\"1\""});
  expect_error([] { from(R"({"head_dim": 64, "rope_theta": ["1"]})"); }, {"rope_theta", "a list of numbers", "\"1\""});
  expect_error([] { from(with("7")); }, {"rope_scaling", "an object", "number"});
  expect_error([] { from(with(R"({"type": 7})")); }, {"type", "a string", "7"});
  expect_error(
      [] { from(with(R"({"type": "mrope", "mrope_section": [1.5]})")); },
      {"mrope_section", "a list of integers", "[1.5]"});
  expect_error(
      [] { from(with(R"({"type": "longrope", "short_factor": ["1"], "long_factor": [1]})")); },
      {"short_factor", "a list of numbers", "[\"1\"]"});
  expect_error(
      [] { from(with(R"({"type": "yarn", "factor": 2, "truncate": 1})")); }, {"truncate", "true or false", "1"});
}

TEST(RotaryEmbeddingHfConfigErrors, NameHeadsThatDoNotDivide) {
  expect_error(
      [] { from(R"({"rope_theta": 7, "hidden_size": 100, "num_attention_heads": 3})"); }, {"hidden_size", "100", "3"});
  expect_error(
      [] { from(R"({"rope_theta": 7, "hidden_size": 100, "num_attention_heads": 0})"); },
      {"num_attention_heads", "100", "0"});
}

TEST(RotaryEmbeddingHfConfigErrors, NamePartsThatAreNone) {
  for (const char* part : {"0", "1.5", "-0.5"}) {
    expect_error(
        [&] { from(std::string(R"({"head_dim": 64, "partial_rotary_factor": )") + part + "}"); },
        {"partial_rotary_factor", part});
  }
}

TEST(RotaryEmbeddingHfConfigErrors, NameTheLayerTypes) {
  const char* const nested = R"({"head_dim": 64, "rope_parameters": {"full_attention": {"rope_type": "default"},
      "sliding_attention": null}})";
  expect_error([&] { from(nested); }, {"layer_type", "full_attention", "sliding_attention", "none"});
  expect_error([&] { from(nested, "local"); }, {"layer_type", "full_attention", "sliding_attention", "'local'"});
  expect_error([&] { from(nested, "sliding_attention"); }, {"sliding_attention", "null"});
  expect_error(
      [] { from(R"({"model_type": "gemma3_text"})"); }, {"layer_type", "full_attention", "sliding_attention", "none"});
  expect_error(
      [] { from(R"({"head_dim": 64, "rope_theta": 7})", "full_attention"); },
      {"layer_type", "alike", "'full_attention'"});
}

TEST(RotaryEmbeddingHfConfigErrors, NameOtherEncodings) {
  expect_error(
      [] { from(R"({"head_dim": 64, "position_embedding_type": "absolute"})"); },
      {"position_embedding_type", "absolute"});
  expect_error([] { from(R"({"head_dim": 64, "alibi": true})"); }, {"alibi"});
}

TEST(RotaryEmbeddingHfConfigErrors, SayWhichLayersAreNotRotated) {
  expect_error(
      [&] { from(R"({"model_type": "granite_swa", "layer_rope_theta": [10000.0, 0], "num_hidden_layers": 2})", "1"); },
      {"layer 1", "not rotated", "layer_rope_theta"});
  expect_error(
      [&] { from(R"({"model_type": "granite_swa", "layer_rope_theta": [5, 7]})"); },
      {"the same layer_rope_theta", "[5,7]", "the number of a layer"});
  expect_error(
      [&] { from(R"({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4})", "3"); },
      {"layer 3", "not rotated", "no_rope_layers"});
  expect_error(
      [&] { from(R"({"model_type": "smollm3", "num_hidden_layers": 4})", "3"); },
      {"layer_types, no_rope_layers or layer_rope_theta", "number of a layer", "got 3 and none of them"});
  expect_error(
      [&] { from(R"({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4})", "4"); },
      {"number of a layer below", "got 4"});
}

TEST(RotaryEmbeddingHfConfigErrors, SayWhyAModelIsNotRotary) {
  for (const char* json :
       {R"({"model_type":"gpt2","n_embd":768,"n_head":12})", R"({"model_type":"opt","hidden_size":768})",
        R"({"model_type":"bloom","hidden_size":64,"n_head":8})", R"({"model_type":"vit","hidden_size":768})",
        R"({"model_type":"baichuan","hidden_size":5120,"num_attention_heads":40,"model_max_length":4096})",
        R"({"model_type":"mpt","d_model":4096,"n_heads":32,"attn_config":{"alibi":true}})",
        R"({"model_type":"t5","d_model":512,"num_heads":8})",
        R"({"model_type":"clip","text_config":{"model_type":"clip_text_model"}})"}) {
    expect_error([&] { from(json); }, {"expected a model with rotary embedding", "table of models", "text_config"});
  }
  expect_error(
      [&] { from(R"({"model_type":"kimi_linear","qk_rope_head_dim":64,"mla_use_nope":true})"); },
      {"kimi_linear", "no rotary embedding"});
  expect_error([&] { from(R"({"model_type":"jamba"})"); }, {"jamba", "no rotary embedding"});
  expect_error(
      [&] { from(R"({"model_type":"granitemoehybrid","position_embedding_type":"nope"})"); },
      {"position_embedding_type", "\"rope\"", "\"nope\""});
}

TEST(RotaryEmbeddingHfConfigErrors, NamePlansOfAGrid) {
  expect_error(
      [] { from(R"({"model_type": "pixtral", "rope_parameters": {"rope_type": "linear", "factor": 2}})"); },
      {"default plan", "grid", "linear(factor=2)"});
}

TEST(RotaryEmbeddingHfConfigErrors, NameBothFieldsOfYarn) {
  expect_error(
      [] {
        RotaryEmbeddingOptions::from_hf_config(
            R"({"model_type":"llama","max_position_embeddings":8192,"rope_scaling":{"type":"yarn"}})");
      },
      {"factor", "original_max_position_embeddings", "yarn", "neither"});
}

#else

TEST(RotaryEmbeddingHfConfigErrors, SayHowToGetTheReader) {
  expect_error([] { RotaryEmbeddingOptions::from_hf_config("{}"); }, {"nlohmann_json", "nlohmann-json3-dev"});
}

#endif

}  // namespace
}  // namespace posenc::test
