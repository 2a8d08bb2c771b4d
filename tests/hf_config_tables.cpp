// Prints the options and frequencies of Hugging Face configurations for tests/python/hf_config_test.py, which compares
// them with transformers. Reads a JSON object from each line of standard input,
//
//   {"config": object, "layer_type": string or null, "lengths": [integer, ...]}
//
// and writes one line for it: {"error": message}, or the options, and the frequencies for each sequence length.
#include <posenc/logging.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/pair_axes.h>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <iostream>
#include <string>

namespace {

using Json = nlohmann::json;

Json answer(const Json& question) {
  std::optional<std::string> layer_type;
  if (question.contains("layer_type") && question["layer_type"].is_string()) {
    layer_type = question["layer_type"].get<std::string>();
  }
  const auto options = posenc::RotaryEmbeddingOptions::from_hf_config(question.at("config").dump(), layer_type);
  posenc::RotaryEmbedding module(options);  // checks the options
  const int64_t rotary_dim = options.rotary_dim().value_or(options.head_dim());
  Json frequencies = Json::array();
  for (const int64_t length : question.at("lengths")) {
    const auto [inv_freq, attention_factor] =
        posenc::rotary_frequencies(rotary_dim, options.base(), options.scaling(), length);
    const at::Tensor contiguous = inv_freq.contiguous();
    const double* first = contiguous.const_data_ptr<double>();
    std::vector<double> values(first, first + contiguous.numel());
    if (!options.pair_frequencies().empty()) {
      std::vector<double> of_pairs;
      for (const int64_t index : options.pair_frequencies()) {
        of_pairs.push_back(values.at(static_cast<size_t>(index)));
      }
      values = of_pairs;
    }
    frequencies.push_back({{"length", length}, {"inv_freq", values}, {"attention_factor", attention_factor}});
  }
  std::vector<int64_t> axes = options.pair_axes();
  if (!options.sections().empty()) {
    axes = posenc::mrope_pair_axes(options.sections(), options.interleaved_sections());
  }
  return {{"head_dim", options.head_dim()},
          {"rotary_dim", rotary_dim},
          {"interleaved", options.interleaved()},
          {"conjugate", options.conjugate()},
          {"pair_axes", axes},
          {"scaling", posenc::to_string(options.scaling())},
          {"base", options.base()},
          {"frequencies", frequencies}};
}

}  // namespace

int main() {
  posenc::set_log_level(posenc::LogLevel::error);
  for (std::string line; std::getline(std::cin, line);) {
    Json written;
    try {
      written = answer(Json::parse(line));
    } catch (const c10::Error& error) {
      written = {{"error", error.what_without_backtrace()}};
    }
    std::cout << written.dump() << '\n' << std::flush;
  }
}
