#pragma once

#include "json_fields.h"

#include <optional>
#include <string>
#include <vector>

/// A Hugging Face configuration file together with what its model_type implies.
namespace posenc::detail {

inline constexpr const char* kFullAttention = "full_attention";
inline constexpr const char* kSlidingAttention = "sliding_attention";

/// The layers that are asked for, all of which rotate alike.
struct HfLayer {
  std::optional<std::string> type;
  std::optional<size_t> index;  // of a single layer
  Json parameters;              // rope_parameters or rope_scaling, that of these layers
  std::string parameters_name;

  Fields plan() const { return {parameters, parameters_name}; }
};

/// The text model of a file, or the only one.
class HfModelConfig {
 public:
  /// @param path_or_json  a path, or the text of the file: what begins with `{`.
  explicit HfModelConfig(const std::string& path_or_json);

  const std::string& type() const { return type_; }

  /// The line of the table.
  Fields row() const { return {row_, "the table of models"}; }

  /// The fields of the file by the names that this library uses, and the defaults of those left out.
  Fields fields() const { return {fields_, name_}; }

  /// What `layer_type` of `from_hf_config` means. An error where layers differ and it is not given, where there is no
  /// such layer, or where it is not rotated.
  HfLayer layer(const std::optional<std::string>& layer_type) const;

  /// `rope_theta` of these layers.
  double base(const HfLayer& layer) const;

  /// `partial_rotary_factor` of these layers.
  double part(const HfLayer& layer) const;

  /// Fields that `per_layer_config` sets for these layers alone.
  Json overrides_of(const HfLayer& layer) const;

 private:
  void check_is_rotary(const Json& file) const;
  void check_is_rotated(const HfLayer& layer) const;
  std::vector<std::string> known_types() const;
  std::optional<double> number_of(const std::string& key, const HfLayer& layer) const;
  std::optional<double> number_of_row(const std::string& key, const HfLayer& layer) const;

  std::string type_;
  std::string name_;  // of the object in the file
  Json row_;
  Json fields_;
};

}  // namespace posenc::detail
