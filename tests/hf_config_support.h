#pragma once

#include <posenc/modules/rotary_embedding.h>

#include <optional>
#include <string>

// Shared by the tests of RotaryEmbeddingOptions::from_hf_config.
namespace posenc::test {

inline RotaryEmbeddingOptions from(
    const std::string& path_or_json,
    const std::optional<std::string>& layer_type = std::nullopt) {
  return RotaryEmbeddingOptions::from_hf_config(path_or_json, layer_type);
}

/// A configuration with `rope_scaling` and additional fields.
inline std::string with(const std::string& rope_scaling, const std::string& fields = "") {
  return R"({"model_type": "llama", "head_dim": 64, "max_position_embeddings": 8192, "rope_scaling": )" + rope_scaling +
      fields + "}";
}

}  // namespace posenc::test
