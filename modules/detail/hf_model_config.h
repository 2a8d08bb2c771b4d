#pragma once

#include "json_fields.h"

#include <optional>
#include <string>
#include <vector>

/// A Hugging Face configuration file together with the defaults of its model_type.
namespace posenc::detail {

inline constexpr const char* kFullAttention = "full_attention";
inline constexpr const char* kSlidingAttention = "sliding_attention";

/// The selected layers, which all rotate in the same way.
struct HfLayer {
  std::optional<std::string> type;
  std::optional<size_t> index;  // set if it is a single layer
  Json parameters;              // rope_parameters or rope_scaling of these layers
  std::string parameters_name;

  Fields plan() const { return {parameters, parameters_name}; }
};

/// The model that is read from a file: its text model, or its only model.
class HfModelConfig {
 public:
  /// @param path_or_json  a path, or the text of the file, which begins with `{`.
  explicit HfModelConfig(const std::string& path_or_json);

  const std::string& type() const { return type_; }

  /// The entry of the model_type in hf_models.json.
  Fields row() const { return {row_, "the table of models"}; }

  /// The fields of the file by their names in this library, with defaults for fields that are left out.
  Fields fields() const { return {fields_, name_}; }

  /// The layers that `layer_type` of `from_hf_config` selects.
  /// @throws c10::Error  if layers differ and no type is given, if there is no such layer, or if it is not rotated.
  HfLayer layer(const std::optional<std::string>& layer_type) const;

  /// `rope_theta` of these layers.
  double base(const HfLayer& layer) const;

  /// `partial_rotary_factor` of these layers.
  double part(const HfLayer& layer) const;

  /// The fields that `per_layer_config` sets for these layers only.
  Json overrides_of(const HfLayer& layer) const;

 private:
  void check_is_rotary(const Json& file) const;
  void check_is_rotated(const HfLayer& layer) const;
  std::vector<std::string> known_types() const;
  std::optional<double> number_of(const std::string& key, const HfLayer& layer) const;
  std::optional<double> number_of_row(const std::string& key, const HfLayer& layer) const;

  std::string type_;
  std::string name_;  // name of the object in the file
  Json row_;
  Json fields_;
};

}  // namespace posenc::detail
