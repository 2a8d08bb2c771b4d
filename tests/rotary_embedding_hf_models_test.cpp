// RotaryEmbeddingOptions::from_hf_config on every model of hf_models.json, and on fields of published files.
#include "data/hf_models.h"
#include "support.h"

#include <posenc/logging.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/pair_axes.h>

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include <fstream>
#include <set>

namespace posenc::test {
namespace {

using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

std::optional<std::string> optional(const char* text) {
  return text == nullptr ? std::nullopt : std::optional<std::string>(text);
}

/// The axis of each pair as a digit; empty if positions have one axis.
std::string axes_of(const RotaryEmbeddingOptions& options) {
  const std::vector<int64_t> axes = options.sections().empty()
      ? options.pair_axes()
      : posenc::mrope_pair_axes(options.sections(), options.interleaved_sections());
  std::string text;
  for (const int64_t axis : axes) {
    text += std::to_string(axis);
  }
  return text;
}

std::string pairing_of(const RotaryEmbeddingOptions& options) {
  return std::string(options.interleaved() ? "interleaved" : "half") + (options.conjugate() ? " conjugate" : "");
}

struct Quiet {
  LogLevel before = posenc::log_level();
  Quiet() { posenc::set_log_level(LogLevel::error); }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
  ~Quiet() { posenc::set_log_level(before); }
};

std::string alone(const std::string& model_type) {
  return R"({"model_type": ")" + model_type + "\"}";
}

TEST(RotaryEmbeddingHfModels, HaveTheDefaultsOfTransformers) {
  const Quiet quiet;
  for (const data::HfModel& model : data::kHfModels) {
    SCOPED_TRACE(std::string(model.model_type) + " " + optional(model.layer_type).value_or(""));
    RotaryEmbeddingOptions options(2);
    ASSERT_NO_THROW(
        options = RotaryEmbeddingOptions::from_hf_config(alone(model.model_type), optional(model.layer_type)));
    EXPECT_EQ(options.head_dim(), model.head_dim);
    EXPECT_EQ(options.rotary_dim().value_or(options.head_dim()), model.rotary_dim);
    EXPECT_EQ(options.base(), model.base);
    const std::string pairing = model.pairing;
    EXPECT_EQ(pairing_of(options), pairing == "conjugate" ? "half conjugate" : pairing);
    EXPECT_EQ(posenc::to_string(options.scaling()), model.scaling);
    EXPECT_EQ(axes_of(options), model.axes);
    EXPECT_NO_THROW(RotaryEmbedding{options});
  }
}

TEST(RotaryEmbeddingHfModels, AreRefusedWhereTheyHaveNoOptions) {
  const Quiet quiet;
  for (const data::HfModelError& model : data::kHfModelErrors) {
    SCOPED_TRACE(std::string(model.model_type) + " " + optional(model.layer_type).value_or(""));
    expect_error(
        [&] { RotaryEmbeddingOptions::from_hf_config(alone(model.model_type), optional(model.layer_type)); },
        {model.message});
  }
}

// Models without a rotary module in transformers, or with one that takes no positions.
constexpr const char* kRefused[] = {"esmfold2", "jamba", "kimi_linear", "nemotron_h", "vjepa2"};

TEST(RotaryEmbeddingHfModels, AreRefusedWithAReason) {
  for (const char* model_type : kRefused) {
    expect_error(
        [&] { RotaryEmbeddingOptions::from_hf_config(alone(model_type)); },
        {"rotary embedding the options can express", std::string("'") + model_type + "': its "});
  }
}

/// The relevant fields of a published file, and the expected options.
struct Published {
  const char* json;
  const char* layer_type;
  int64_t head_dim;
  int64_t rotary_dim;
  double base;
  const char* pairing;
  const char* scaling;
};

const char* const kFull = "full_attention";
const char* const kSliding = "sliding_attention";

// clang-format off
const Published kPublished[] = {
    {R"({"model_type":"jetmoe","hidden_size":2048,"num_attention_heads":32,"kv_channels":96})", nullptr, 96, 96, 10000, "half", "default"},
    {R"({"model_type":"zamba2","hidden_size":2560,"num_attention_heads":32,"attention_head_dim":160})", nullptr, 160, 160, 10000, "half", "default"},
    {R"({"model_type":"gemma4_text","head_dim":256,"per_layer_config":{"05":{"head_dim":128}}})", kFull, 128, 128, 1e6, "half", "proportional(partial_rotary_factor=0.25, factor=1)"},
    {R"({"model_type":"gemma4_text","head_dim":256,"per_layer_config":{"05":{"head_dim":128}}})", kSliding, 256, 256, 10000, "half", "default"},
    {R"({"model_type":"gemma4_unified_text","layer_types":["sliding_attention","full_attention"],"per_layer_config":{"1":{"head_dim":64}}})", kFull, 64, 64, 1e6, "half", "proportional(partial_rotary_factor=0.25, factor=1)"},
    {R"({"model_type":"gemma4_unified_text","layer_types":["sliding_attention","full_attention"],"per_layer_config":{"1":{"head_dim":64}}})", "1", 64, 64, 1e6, "half", "proportional(partial_rotary_factor=0.25, factor=1)"},
    {R"({"model_type":"deepseek_v4","head_dim":512,"qk_rope_head_dim":64,"rope_parameters":{"main":{},"compress":{}}})", "main", 64, 64, 10000, "interleaved", "default"},
    {R"({"model_type":"glm_ocr_text","head_dim":64})", nullptr, 64, 64, 10000, "interleaved", "default"},
    {R"({"model_type":"ernie4_5_moe_vl","head_dim":128,"rope_scaling":{"mrope_section":[22,22,20]}})", nullptr, 128, 128, 500000, "interleaved", "default"},
    {R"({"model_type":"nanochat","head_dim":128})", nullptr, 128, 128, 10000, "half conjugate", "default"},
    {R"({"model_type":"granite_swa","layer_rope_theta":[20000.0,0],"num_hidden_layers":2})", "0", 128, 128, 20000, "half", "default"},
    {R"({"model_type":"granitemoe_swa","layer_rope_theta":[5,7],"layer_types":["full_attention","sliding_attention"]})", kSliding, 128, 128, 7, "half", "default"},
    {R"({"model_type":"chatglm","hidden_size":4096,"num_attention_heads":32,"kv_channels":128,"rope_ratio":500})", nullptr, 128, 64, 5e6, "interleaved", "default"},
    {R"({"model_type":"nomic_bert","n_embd":768,"n_head":12,"rotary_emb_base":1000,"rotary_emb_fraction":0.5,"rotary_emb_interleaved":true})", nullptr, 64, 32, 1000, "interleaved", "default"},
    {R"({"model_type":"cosmos3_edge_text","rope_parameters":{"rope_type":"default","mrope_section":[24,20,20]}})", nullptr, 128, 128, 1e8, "half", "default"},
    {R"({"model_type":"cohere2","position_embedding_type":"rope_gptj","hidden_size":4096,"num_attention_heads":32,"rope_theta":50000})", nullptr, 128, 128, 50000, "interleaved", "default"},
    {R"({"model_type":"exaone4","sliding_window":null})", kFull, 128, 128, 10000, "half", "default"},
    {R"({"model_type":"llama4_text","no_rope_layers":[1,0],"layer_types":["full_attention","full_attention"]})", kFull, 128, 128, 500000, "interleaved", "default"},
    {R"({"model_type":"smollm3","no_rope_layers":[1,1,1,0],"num_hidden_layers":4})", "2", 128, 128, 2e6, "half", "default"},
    {R"({"model_type":"kimi_k2","qk_rope_head_dim":64,"rope_theta":50000.0,"rope_scaling":{"type":"yarn","beta_fast":1.0,"beta_slow":1.0,"factor":32.0,"mscale":1.0,"mscale_all_dim":1.0,"original_max_position_embeddings":4096}})", nullptr, 64, 64, 50000, "interleaved", "yarn(factor=32, original_max_position_embeddings=4096, beta_fast=1, beta_slow=1, truncate=true, mscale=1, mscale_all_dim=1)"},
    {R"({"model_type":"modernbert","position_embedding_type":"absolute","global_rope_theta":160000.0,"local_rope_theta":10000.0})", kFull, 64, 64, 160000, "half", "default"},
    {R"({"model_type":"modernbert","position_embedding_type":"absolute","global_rope_theta":160000.0,"local_rope_theta":20000.0})", kSliding, 64, 64, 20000, "half", "default"},
    {R"({"model_type":"llava","text_config":{"model_type":"llama","max_position_embeddings":4096}})", nullptr, 128, 128, 10000, "half", "default"},
    {R"({"model_type":"llava","text_config":{"max_position_embeddings":4096}})", nullptr, 128, 128, 10000, "half", "default"},
    {R"({"model_type":"qwen2_5_omni","thinker_config":{"text_config":{"model_type":"qwen2_5_omni_text"}}})", nullptr, 128, 128, 1e6, "half", "default"},
    {R"({"language_config":{"model_type":"llama"}})", nullptr, 128, 128, 10000, "half", "default"},
    {R"({"llm_config":{"model_type":"qwen2","rope_theta":1000000.0}})", nullptr, 128, 128, 1e6, "half", "default"},
    {R"({"vlm_config":{"text_config":{"model_type":"gemma"}}})", nullptr, 256, 256, 10000, "half", "default"},
    {R"({"model_type":"t5gemma","decoder":{"head_dim":128}})", kFull, 128, 128, 10000, "half", "default"},
    {R"({"model_type":"dbrx","d_model":6144,"n_heads":48,"max_seq_len":32768,"attn_config":{"rope_theta":500000}})", nullptr, 128, 128, 500000, "half", "default"},
    {R"({"model_type":"moonshine","hidden_size":416,"decoder_num_attention_heads":8,"partial_rotary_factor":0.62})", nullptr, 52, 32, 10000, "interleaved", "default"},
    {R"({"model_type":"ministral3","rope_parameters":{"rope_type":"yarn","factor":16.0,"original_max_position_embeddings":16384.0,"rope_theta":1000000.0}})", nullptr, 128, 128, 1e6, "half", "yarn(factor=16, original_max_position_embeddings=16384, beta_fast=32, beta_slow=1, truncate=true)"},
    {R"({"model_type":"hunyuan_vl","head_dim":128,"rope_scaling":{"type":"xdrope","alpha":1000.0,"xdrope_section":[16,16,16,16]}})", nullptr, 128, 128, 10000, "half", "ntk(factor=1000)"},
    {R"({"model_type":"hunyuan_vl_text","head_dim":128})", nullptr, 128, 128, 10000, "half", "default"},
    {R"({"model_type":"new","hidden_size":768,"num_attention_heads":12,"rope_theta":160000,"rope_scaling":{"type":"ntk","factor":2.0}})", nullptr, 64, 64, 160000, "half", "ntk(factor=2)"},
    {R"({"model_type":"bailing_hybrid","model_max_length":32768,"rope_scaling":{"type":"dynamic","factor":2.0}})", kFull, 64, 64, 6e6, "interleaved", "dynamic(factor=2, max_position_embeddings=32768, seq_len_multiple=1)"},
    {R"({"model_type":"roformer"})", nullptr, 64, 64, 10000, "interleaved", "default"},
    {R"({"model_type":"granitemoehybrid","position_embedding_type":"rope"})", nullptr, 128, 128, 10000, "half", "default"},
    {R"({"model_type":"esm","position_embedding_type":"rotary"})", nullptr, 64, 64, 10000, "half", "default"},
    {R"({"model_type":"qwen","hidden_size":4096,"num_attention_heads":32,"rotary_emb_base":10000,"rotary_pct":1.0})", nullptr, 128, 128, 10000, "half", "default"},
    {R"({"model_type":"internlm2","hidden_size":4096,"num_attention_heads":32,"rope_theta":1000000})", nullptr, 128, 128, 1e6, "half", "default"},
};
// clang-format on

TEST(RotaryEmbeddingHfModels, AreReadAsTheyArePublished) {
  const Quiet quiet;
  for (const Published& file : kPublished) {
    SCOPED_TRACE(file.json);
    RotaryEmbeddingOptions options(2);
    ASSERT_NO_THROW(options = RotaryEmbeddingOptions::from_hf_config(file.json, optional(file.layer_type)));
    EXPECT_EQ(options.head_dim(), file.head_dim);
    EXPECT_EQ(options.rotary_dim().value_or(options.head_dim()), file.rotary_dim);
    EXPECT_EQ(options.base(), file.base);
    EXPECT_EQ(pairing_of(options), file.pairing);
    EXPECT_EQ(posenc::to_string(options.scaling()), file.scaling);
    EXPECT_NO_THROW(RotaryEmbedding{options});
  }
}

TEST(RotaryEmbeddingHfModels, OfErnieAlternateHeightAndWidth) {
  const auto options = RotaryEmbeddingOptions::from_hf_config(R"({"model_type": "ernie4_5_vl_moe_text", "head_dim": 16,
      "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4]}})");
  EXPECT_EQ(options.pair_axes(), (std::vector<int64_t>{1, 2, 1, 2, 0, 0, 0, 0}));
  EXPECT_TRUE(options.pair_frequencies().empty());
}

TEST(RotaryEmbeddingHfModels, OfVisionEncodersShareFrequencies) {
  const auto of = [](const char* model_type) {
    return RotaryEmbeddingOptions::from_hf_config(
        std::string(R"({"head_dim": 16, "model_type": ")") + model_type + "\"}");
  };
  EXPECT_EQ(of("pixtral").pair_axes(), (std::vector<int64_t>{0, 0, 0, 0, 1, 1, 1, 1}));
  EXPECT_EQ(of("pixtral").pair_frequencies(), (std::vector<int64_t>{0, 2, 4, 6, 1, 3, 5, 7}));
  EXPECT_EQ(of("qwen2_vl_vision").pair_axes(), (std::vector<int64_t>{0, 0, 0, 0, 1, 1, 1, 1}));
  EXPECT_EQ(of("qwen2_vl_vision").pair_frequencies(), (std::vector<int64_t>{0, 2, 4, 6, 0, 2, 4, 6}));
  EXPECT_EQ(of("step3p5_vision").pair_axes(), (std::vector<int64_t>{1, 1, 1, 1, 0, 0, 0, 0}));
  EXPECT_EQ(of("kimi_k25_vision").pair_axes(), (std::vector<int64_t>{1, 0, 1, 0, 1, 0, 1, 0}));
  EXPECT_EQ(of("kimi_k25_vision").pair_frequencies(), (std::vector<int64_t>{0, 0, 2, 2, 4, 4, 6, 6}));
}

std::string warnings_of(const std::string& json) {
  ::testing::internal::CaptureStderr();
  RotaryEmbeddingOptions::from_hf_config(json);
  return ::testing::internal::GetCapturedStderr();
}

TEST(RotaryEmbeddingHfModelWarnings, NameFieldsOfAnotherPlan) {
  const std::string text = warnings_of(
      R"({"model_type":"llama","rope_scaling":{"type":"linear","factor":2.0,"beta_fast":32,"low_freq_factor":1.5}})");
  for (const char* part : {"'linear' does not read beta_fast = 32", "'linear' does not read low_freq_factor = 1.5"}) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  }
  EXPECT_EQ(text.find("factor = 2"), std::string::npos) << text;
  EXPECT_EQ(warnings_of(R"({"model_type":"llama","rope_scaling":{"type":"linear","factor":2.0}})"), "");
}

TEST(RotaryEmbeddingHfModelWarnings, SayThatAModelIsUnknown) {
  EXPECT_NE(
      warnings_of(R"({"model_type":"unheard","head_dim":64,"rope_theta":7})").find("'unheard' is not in the table"),
      std::string::npos);
}

TEST(RotaryEmbeddingHfModels, AreAllChecked) {
  std::ifstream file(POSENC_HF_MODELS);
  const auto models = nlohmann::json::parse(file);
  std::set<std::string> checked;
  for (const data::HfModel& model : data::kHfModels) {
    checked.insert(model.model_type);
  }
  for (const data::HfModelError& model : data::kHfModelErrors) {
    checked.insert(model.model_type);
  }
  checked.insert(std::begin(kRefused), std::end(kRefused));
  for (const Published& published : kPublished) {
    checked.insert(nlohmann::json::parse(published.json).value("model_type", ""));
  }
  for (const auto& [model_type, row] : models.items()) {
    EXPECT_EQ(checked.count(model_type), 1) << "no check of the line of " << model_type;
  }
}

}  // namespace
}  // namespace posenc::test
