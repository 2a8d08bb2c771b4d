#include "hf_model_config.h"

#include "hf_models.h"

#include <posenc/logging.h>

#include <fstream>
#include <set>
#include <sstream>

namespace posenc::detail {

namespace {

/// Fields that hold the text model of a model with several parts.
const std::vector<std::string>& text_keys() {
  static const std::vector<std::string> keys = {"text_config", "thinker_config", "language_config",
                                                "llm_config",  "vlm_config",     "decoder"};
  return keys;
}

/// Fields that only models with rotary embedding have.
const std::vector<std::string>& rotary_fields() {
  static const std::vector<std::string> fields = {
      "rope_theta",          "rope_parameters",  "rope_scaling",     "partial_rotary_factor",
      "rotary_dim",          "rotary_pct",       "rope_pct",         "rotary_emb_base",
      "rotary_emb_fraction", "rope_interleave",  "rope_ratio",       "rope_local_base_freq",
      "global_rope_theta",   "local_rope_theta", "qk_rope_head_dim", "layer_rope_theta"};
  return fields;
}

/// Names of a field; the first one is the name in this library.
const std::vector<std::vector<std::string>>& field_names() {
  static const std::vector<std::vector<std::string>> names = {
      {"hidden_size", "n_embd", "d_model"},
      {"num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_num_attention_heads"},
      {"max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "seq_length"},
      {"partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_emb_fraction", "partial_rotary_factors"},
      {"rope_theta", "rotary_emb_base", "global_rope_theta"},
      {"local_rope_theta", "rope_local_base_freq", "swa_rope_theta", "compress_rope_theta"},
  };
  return names;
}

bool contains(const std::vector<std::string>& words, const std::string& word) {
  return std::find(words.begin(), words.end(), word) != words.end();
}

std::string text_of(const std::string& path_or_json) {
  const size_t begin = path_or_json.find_first_not_of(" \t\r\n");
  if (begin != std::string::npos && path_or_json[begin] == '{') {
    return path_or_json;
  }
  std::ifstream file(path_or_json);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    fail_hf_config("expected a path of a readable file or the text of a JSON object, got '", path_or_json, "'");
  }
  return text.str();
}

Json parsed(const std::string& text) {
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    fail_hf_config("expected JSON, got what cannot be parsed: ", error.what());
  }
}

/// Copies fields with another name to their name in this library, unless that exists.
void rename_fields(Json& file, const Fields& row) {
  for (const std::vector<std::string>& names : field_names()) {
    const auto given = std::find_if(
        names.begin(), names.end(), [&](const std::string& name) { return Fields(file, "config.json").has(name); });
    if (given != names.end() && given != names.begin()) {
      file[names.front()] = Json(file[*given]);
    }
  }
  if (const auto attention = file.find("attn_config");  // DBRX
      attention != file.end() && attention->is_object() && attention->contains("rope_theta") &&
      !file.contains("rope_theta")) {
    file["rope_theta"] = Json(attention->at("rope_theta"));
  }
  if (const auto names = row.object("names")) {
    for (const auto& [name, other] : names->json().items()) {
      file.erase(name);
      if (other.is_string() && file.contains(other.get<std::string>())) {
        file[name] = Json(file[other.get<std::string>()]);
      }
    }
  }
}

/// The names of the layer types that `parameters` is nested by; empty if it is not nested.
std::vector<std::string> nested_types(const Json& parameters) {
  std::vector<std::string> types;
  for (const auto& [key, value] : parameters.items()) {
    if (value.is_object() || (value.is_null() && (key == kFullAttention || key == kSlidingAttention))) {
      types.push_back(key);
    }
  }
  return types;
}

void check_layer_type(const std::optional<std::string>& layer_type, const std::vector<std::string>& types) {
  if (!layer_type) {
    fail_hf_config("expected a layer_type, since layers differ (", joined(types), "), got none");
  }
  if (!contains(types, *layer_type)) {
    fail_hf_config(
        "expected a layer_type out of ", types.empty() ? "none: all layers are alike" : joined(types), "; got '",
        *layer_type, "'");
  }
}

/// The distinct values of the layers that `layer` selects. `values` has one entry for each layer.
std::set<double> values_of(const std::vector<double>& values, const HfLayer& layer, const Fields& model) {
  const std::vector<std::string> types = model.strings("layer_types").value_or(std::vector<std::string>());
  std::set<double> found;
  for (size_t i = 0; i < values.size(); ++i) {
    const bool asked = layer.index ? *layer.index == i : !layer.type || i >= types.size() || types[i] == *layer.type;
    if (asked) {
      found.insert(values[i]);
    }
  }
  return found;
}

std::string described(const HfLayer& layer) {
  return layer.index ? "layer " + std::to_string(*layer.index)
      : layer.type   ? "layers of type '" + *layer.type + "'"
                     : "layers";
}

[[noreturn]] void fail_unrotated(const HfLayer& layer, const std::string& reason) {
  fail_hf_config("expected layers with rotary embedding, got ", described(layer), ", which are not rotated: ", reason);
}

}  // namespace

HfModelConfig::HfModelConfig(const std::string& path_or_json) : name_("config.json") {
  const Json file = parsed(text_of(path_or_json));
  const Json* model = &Fields(file, name_).json();
  type_ = Fields(*model, name_).string("model_type").value_or("");
  // The text model may leave out its model_type; then the enclosing model determines it.
  for (bool inside = true; inside;) {
    inside = false;
    for (const std::string& key : text_keys()) {
      if (const auto found = model->find(key); found != model->end() && found->is_object()) {
        const std::string otherwise = Fields(hf_model(type_), "row").string("text").value_or(type_);
        model = &*found;
        name_ = key;
        type_ = Fields(*model, name_).string("model_type").value_or(otherwise);
        inside = true;
        break;
      }
    }
  }
  row_ = hf_model(type_);
  while (row_.contains("text")) {
    Json inner = hf_model(row_.at("text"));
    row_.erase("text");
    inner.merge_patch(row_);
    row_ = std::move(inner);
  }
  fields_ = row_.value("defaults", Json::object());
  Json given = *model;
  rename_fields(given, row());
  fields_.merge_patch(given);
  // merge_patch drops fields that are null. In these objects null means layers without rotation.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (given.contains(key)) {
      fields_[key] = given[key];
    }
  }
  check_is_rotary(given);
}

void HfModelConfig::check_is_rotary(const Json& file) const {
  if (const auto reason = row().string("error")) {
    fail_hf_config("expected a model whose rotary embedding the options can express, got '", type_, "': ", *reason);
  }
  const Fields given(file, name_);
  if (given.boolean("alibi").value_or(false)) {
    fail_hf_config("expected a model with rotary embedding, got one with alibi");
  }
  if (const auto requires_values = row().object("requires")) {
    for (const auto& [key, value] : requires_values->json().items()) {
      const Json* got = fields().find(key);
      if (got == nullptr || *got != value) {
        fail_hf_config(
            "expected a model with rotary embedding, which '", type_, "' has where ", key, " is ", value.dump(),
            ", got ", got == nullptr ? "none" : got->dump());
      }
    }
  }
  if (!row_.empty()) {
    return;
  }
  const std::string kind = given.string("position_embedding_type").value_or("");
  if (!kind.empty() && kind.rfind("rope", 0) != 0 && kind != "rotary") {
    fail_hf_config("expected a model with rotary embedding, got position_embedding_type '", kind, "'");
  }
  if (kind.empty() && std::none_of(rotary_fields().begin(), rotary_fields().end(), [&](const std::string& key) {
        return given.has(key);
      })) {
    fail_hf_config(
        "expected a model with rotary embedding, got ", type_.empty() ? "no model_type" : "model_type '" + type_ + "'",
        " in ", name_, ", which is not in the table of models, and none of the fields ", joined(rotary_fields()),
        "; a text model inside another one is looked for under ", joined(text_keys()));
  }
  log(LogLevel::warning,
      "from_hf_config: " +
          (type_.empty() ? "no model_type" : "model_type '" + type_ + "' is not in the table of models") +
          ": half pairing is assumed where rope_interleave is left out, and a rope_theta of 10000");
}

std::vector<std::string> HfModelConfig::known_types() const {
  std::vector<std::string> types;
  for (const auto& list : {fields().strings("layer_types"), row().strings("layer_types")}) {
    for (const std::string& type : list.value_or(std::vector<std::string>())) {
      if (!contains(types, type)) {
        types.push_back(type);
      }
    }
  }
  return types;
}

HfLayer HfModelConfig::layer(const std::optional<std::string>& layer_type) const {
  HfLayer layer;
  layer.type = layer_type;
  if (layer_type && !layer_type->empty() && layer_type->find_first_not_of("0123456789") == std::string::npos) {
    layer.type = std::nullopt;
    layer.index = layer_type->size() < 10 ? std::stoul(*layer_type) : SIZE_MAX;
    const auto types = fields().strings("layer_types");
    const auto lists_layers = [this](const char* key) {
      return !fields().numbers(key).value_or(std::vector<double>()).empty();
    };
    if (!types && !lists_layers("no_rope_layers") && !lists_layers("layer_rope_theta")) {
      fail_hf_config(
          "expected layer_types, no_rope_layers or layer_rope_theta in ", name_, " with the number of a layer, got ",
          *layer_type, " and none of them");
    }
    if (types && *layer.index < types->size()) {
      layer.type = (*types)[*layer.index];
    } else if (types || *layer.index >= static_cast<size_t>(fields().integer("num_hidden_layers").value_or(0))) {
      fail_hf_config(
          "expected the number of a layer below that of num_hidden_layers and layer_types in ", name_, ", got ",
          *layer_type);
    }
  }
  layer.parameters = Json::object();
  layer.parameters_name = "rope_parameters";
  check_is_rotated(layer);
  const Json of_row = row_.value("rope_parameters", Json::object());
  bool given = false;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {  // in the order of transformers
    if (const auto object = fields().object(key); object && !object->json().empty()) {
      layer.parameters = object->json();
      layer.parameters_name = key;
      given = true;
      break;
    }
  }
  if (!given) {
    layer.parameters = of_row;
  }
  std::vector<std::string> types = nested_types(layer.parameters);
  if (!types.empty()) {
    if (!layer.type && types.size() == 1) {
      layer.type = types.front();
    }
    check_layer_type(layer.type, types);
    const Json nested = layer.parameters.at(*layer.type);
    if (nested.is_null()) {
      fail_unrotated(layer, layer.parameters_name + " has null for them");
    }
    layer.parameters = nested;
    layer.parameters_name += "." + *layer.type;
  } else if (types = nested_types(of_row); !types.empty() || fields().has("local_rope_theta")) {
    check_layer_type(layer.type, types.empty() ? std::vector<std::string>{kFullAttention, kSlidingAttention} : types);
    const std::string planned = row().string("flat_plan").value_or(kFullAttention);
    if (planned != "all" && planned != *layer.type) {
      layer.parameters = Json::object();
    }
  } else if (layer.type && !layer.index) {
    check_layer_type(layer.type, known_types());
  }
  return layer;
}

void HfModelConfig::check_is_rotated(const HfLayer& layer) const {
  const bool listed = layer.index || !layer.type || fields().has("layer_types");
  for (const char* key : {"no_rope_layers", "layer_rope_theta"}) {
    const auto values = fields().numbers(key).value_or(std::vector<double>());
    if (listed && !values.empty()) {
      const std::set<double> own = values_of(values, layer, fields());
      if (own.empty() || (own.size() == 1 && *own.begin() == 0)) {
        fail_unrotated(layer, std::string(key) + " in " + name_ + " has 0 for them");
      }
      return;
    }
  }
  const auto condition = row().string("unrotated_with");
  const auto unrotated = row().strings("unrotated").value_or(std::vector<std::string>());
  if (layer.type && contains(unrotated, *layer.type) && (!condition || fields().has(*condition))) {
    fail_unrotated(layer, "'" + type_ + "' rotates other layers only");
  }
}

std::optional<double> HfModelConfig::number_of(const std::string& key, const HfLayer& layer) const {
  const Json* value = fields().find(key);
  if (value == nullptr || !value->is_array() || value->empty()) {
    return fields().number(key);
  }
  std::set<double> own = values_of(*fields().numbers(key), layer, fields());
  if (own.size() > 1) {
    own.erase(0);
  }
  if (own.size() != 1) {
    fail_hf_config(
        "expected ", described(layer), " to have the same ", key, " in ", name_, ", got ", value->dump(),
        "; give one of the layer types of layer_types, or the number of a layer, as layer_type");
  }
  return *own.begin();
}

std::optional<double> HfModelConfig::number_of_row(const std::string& key, const HfLayer& layer) const {
  const Json* value = row().find(key);
  if (value == nullptr || !value->is_object()) {
    return row().number(key);
  }
  return layer.type ? row().object(key)->number(*layer.type) : std::nullopt;
}

double HfModelConfig::base(const HfLayer& layer) const {
  const bool by_layer = row_.contains("base") && row_.at("base").is_object();
  const bool local = layer.type && *layer.type != kFullAttention && (by_layer || fields().has("local_rope_theta")) &&
      *layer.type != "main" && *layer.type != "indexed_attention" && *layer.type != "hybrid";
  const double base =
      first_of({number_of("layer_rope_theta", layer), layer.plan().number("rope_theta"),
                number_of(local ? "local_rope_theta" : "rope_theta", layer), number_of_row("base", layer)})
          .value_or(10000.0);
  return base * fields().number("rope_ratio").value_or(1.0);
}

double HfModelConfig::part(const HfLayer& layer) const {
  const double factor = first_of({layer.plan().number("partial_rotary_factor"),
                                  number_of("partial_rotary_factor", layer), number_of_row("part", layer)})
                            .value_or(1.0);
  if (!(factor > 0 && factor <= 1)) {
    fail_hf_config("expected a partial_rotary_factor above 0 and at most 1, got ", factor);
  }
  return factor;
}

Json HfModelConfig::overrides_of(const HfLayer& layer) const {
  const auto by_index = fields().object("per_layer_config");
  if (!by_index || (!layer.type && !layer.index)) {
    return Json::object();
  }
  const auto types = fields().strings("layer_types").value_or(std::vector<std::string>());
  // Without layer_types, the line of the model_type in hf_models.json names the type of these layers.
  const std::string apart = row().string("per_layer_type").value_or(kFullAttention);
  for (const auto& [key, value] : by_index->json().items()) {
    if (key.empty() || key.size() > 9 || key.find_first_not_of("0123456789") != std::string::npos) {
      fail_hf_config("expected the fields of per_layer_config in ", name_, " to be numbers of layers, got ", key);
    }
    const size_t index = std::stoul(key);
    const bool asked =
        layer.index ? *layer.index == index : (index < types.size() ? types[index] : apart) == *layer.type;
    if (asked) {
      return value;
    }
  }
  return Json::object();
}

}  // namespace posenc::detail
