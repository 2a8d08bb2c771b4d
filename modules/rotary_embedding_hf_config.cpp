// RotaryEmbeddingOptions::from_hf_config. The names and defaults of fields are those of the configuration classes of
// transformers 5 and of the files that the models are published with.
#include <posenc/modules/rotary_embedding.h>

#include <c10/util/Exception.h>

#if POSENC_JSON
#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string_view>
#include <utility>
#include <vector>
#endif

namespace posenc {

#if POSENC_JSON

namespace {

using Json = nlohmann::json;

/// Rows of the first tables are no more than this: Llama 4 names ten million positions, which are 5 GB of tables.
constexpr int64_t kMostInitialRows = 131072;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  TORCH_CHECK(false, "posenc::RotaryEmbeddingOptions::from_hf_config: ", parts...);
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) {
    text += (text.empty() ? "" : ", ") + word;
  }
  return text;
}

// --- Typed access ---------------------------------------------------------------------------------------------

/// An object of the file, whose fields are absent, null (which is the same here) or of the type asked for.
class Fields {
 public:
  Fields(const Json& object, std::string name) : object_(&object), name_(std::move(name)) {
    if (!object.is_object()) {
      fail("expected ", name_, " to be an object, got ", object.type_name());
    }
  }

  const Json& json() const { return *object_; }
  const std::string& name() const { return name_; }

  bool has(const std::string& key) const { return find(key) != nullptr; }

  std::optional<double> number(const std::string& key) const {
    return get<double>(key, "a number", [](const Json& value) { return value.is_number(); });
  }

  std::optional<int64_t> integer(const std::string& key) const {
    return get<int64_t>(key, "an integer", [](const Json& value) { return value.is_number_integer(); });
  }

  std::optional<bool> boolean(const std::string& key) const {
    return get<bool>(key, "true or false", [](const Json& value) { return value.is_boolean(); });
  }

  std::optional<std::string> string(const std::string& key) const {
    return get<std::string>(key, "a string", [](const Json& value) { return value.is_string(); });
  }

  std::optional<std::vector<double>> numbers(const std::string& key) const {
    return get<std::vector<double>>(key, "a list of numbers", [](const Json& value) {
      return value.is_array() && std::all_of(value.begin(), value.end(), [](const Json& x) { return x.is_number(); });
    });
  }

  std::optional<std::vector<int64_t>> integers(const std::string& key) const {
    return get<std::vector<int64_t>>(key, "a list of integers", [](const Json& value) {
      return value.is_array() &&
          std::all_of(value.begin(), value.end(), [](const Json& x) { return x.is_number_integer(); });
    });
  }

  std::optional<std::vector<std::string>> strings(const std::string& key) const {
    return get<std::vector<std::string>>(key, "a list of strings", [](const Json& value) {
      return value.is_array() && std::all_of(value.begin(), value.end(), [](const Json& x) { return x.is_string(); });
    });
  }

  std::optional<Fields> object(const std::string& key) const {
    const Json* value = find(key);
    return value == nullptr ? std::nullopt : std::optional(Fields(*value, key));
  }

 private:
  const Json* find(const std::string& key) const {
    const auto found = object_->find(key);
    return found == object_->end() || found->is_null() ? nullptr : &*found;
  }

  template <typename T, typename Is>
  std::optional<T> get(const std::string& key, const char* expected, const Is& is) const {
    const Json* value = find(key);
    if (value == nullptr) {
      return std::nullopt;
    }
    if (!is(*value)) {
      fail("expected ", key, " in ", name_, " to be ", expected, ", got ", value->dump());
    }
    return value->get<T>();
  }

  const Json* object_;
  std::string name_;
};

/// The first of `values` that is there.
template <typename T>
std::optional<T> first_of(std::initializer_list<std::optional<T>> values) {
  const auto found = std::find_if(values.begin(), values.end(), [](const auto& value) { return value.has_value(); });
  return found == values.end() ? std::nullopt : *found;
}

template <typename T>
T required(const std::optional<T>& value, const char* key, const Fields& fields, const std::string& what) {
  if (!value) {
    fail("expected ", key, " in ", fields.name(), " for ", what, ", got none");
  }
  return *value;
}

// --- What a model_type implies --------------------------------------------------------------------------------

/// Defaults of the configuration classes, for fields that published files leave out.
struct ModelDefaults {
  const char* model_type = "";
  std::optional<int64_t> head_dim = std::nullopt;
  double rope_theta = 10000.0;
  double partial_rotary_factor = 1.0;
  std::optional<int64_t> rotary_dim = std::nullopt;
  std::optional<double> local_rope_theta = std::nullopt;  // of layers with sliding attention, where it differs
};

ModelDefaults defaults_of(const std::string& model_type) {
  const auto with_head = [](const char* name, int64_t head_dim, double rope_theta = 10000.0, double partial = 1.0) {
    return ModelDefaults{name, head_dim, rope_theta, partial};
  };
  const auto with_part = [](const char* name, double partial) {
    return ModelDefaults{name, std::nullopt, 10000.0, partial};
  };
  const auto with_base = [](const char* name, double rope_theta) {
    return ModelDefaults{name, std::nullopt, rope_theta};
  };
  static const std::vector<ModelDefaults> defaults = {
      ModelDefaults{"codegen", std::nullopt, 10000.0, 1.0, 64},
      with_base("cohere", 500000.0),
      with_head("ernie4_5", 128, 500000.0),
      with_base("ernie4_5_moe", 500000.0),
      with_head("gemma", 256),
      with_head("gemma2", 256),
      ModelDefaults{"gemma3_text", 256, 1000000.0, 1.0, std::nullopt, 10000.0},
      ModelDefaults{"gemma3n_text", 256, 1000000.0, 1.0, std::nullopt, 10000.0},
      with_head("glm", 128, 10000.0, 0.5),
      with_head("glm4", 128, 10000.0, 0.5),
      with_part("glm4_moe", 0.5),
      with_part("gpt_neox", 0.25),
      with_head("gpt_oss", 64, 150000.0),
      ModelDefaults{"gptj", std::nullopt, 10000.0, 1.0, 64},
      with_head("helium", 128, 100000.0),
      with_head("llama4_text", 128, 500000.0),
      with_base("mixtral", 1000000.0),
      ModelDefaults{"modernbert", std::nullopt, 160000.0, 1.0, std::nullopt, 10000.0},
      with_part("nemotron", 0.5),
      with_base("olmo3", 500000.0),
      with_part("persimmon", 0.5),
      with_part("phi", 0.5),
      with_base("qwen2_vl", 1000000.0),
      with_base("qwen2_vl_text", 1000000.0),
      with_part("qwen3_next", 0.25),
      with_head("qwen3_vl_text", 128, 500000.0),
      with_part("stablelm", 0.25),
  };
  const auto found = std::find_if(
      defaults.begin(), defaults.end(), [&](const ModelDefaults& one) { return one.model_type == model_type; });
  return found == defaults.end() ? ModelDefaults() : *found;
}

/// Models whose pairs are channels (2i, 2i + 1), where the file has no `rope_interleave`.
bool interleaves(const std::string& model_type) {
  constexpr std::string_view kModelTypes[] = {
      "blt",         "codegen",       "cohere",      "cohere2",      "cohere2_moe", "deepseek_v2",
      "deepseek_v3", "deepseek_v32",  "ernie4_5",    "ernie4_5_moe", "glm",         "glm4",
      "glm4v_text",  "glm4_moe_lite", "glm_moe_dsa", "gptj",         "helium",      "kimi_k2",
      "llama4_text", "longcat_flash", "mistral4",    "moonshine",
  };
  return std::find(std::begin(kModelTypes), std::end(kModelTypes), model_type) != std::end(kModelTypes);
}

// --- Parts of a configuration ---------------------------------------------------------------------------------

std::string text_of(const std::string& path_or_json) {
  const size_t begin = path_or_json.find_first_not_of(" \t\r\n");
  if (begin != std::string::npos && path_or_json[begin] == '{') {
    return path_or_json;
  }
  std::ifstream file(path_or_json);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    fail("expected a path of a readable file or the text of a JSON object, got '", path_or_json, "'");
  }
  return text.str();
}

Json parsed(const std::string& text) {
  try {
    return Json::parse(text);
  } catch (const Json::parse_error& error) {
    fail("expected JSON, got what cannot be parsed: ", error.what());
  }
}

/// The rotary embedding of one kind of layers.
struct LayerRope {
  double base;
  std::optional<Fields> parameters;  // of the plan
};

const char* const kFullAttention = "full_attention";
const char* const kSlidingAttention = "sliding_attention";

void check_layer_type(const std::optional<std::string>& layer_type, const std::vector<std::string>& types) {
  if (!layer_type) {
    fail("expected a layer_type, since layers differ (", joined(types), "), got none");
  }
  if (std::find(types.begin(), types.end(), *layer_type) == types.end()) {
    fail(
        "expected a layer_type out of ", types.empty() ? "none: all layers are alike" : joined(types), "; got '",
        *layer_type, "'");
  }
}

/// Names of layer types that `parameters` is nested by; empty where it is not.
std::vector<std::string> nested_types(const Fields& parameters) {
  std::vector<std::string> types;
  for (const auto& [key, value] : parameters.json().items()) {
    if (value.is_object() || (value.is_null() && (key == kFullAttention || key == kSlidingAttention))) {
      types.push_back(key);
    }
  }
  return types;
}

LayerRope rope_of_layers(
    const Fields& model,
    const ModelDefaults& defaults,
    const std::optional<std::string>& layer_type) {
  const char* const key = model.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  const std::optional<Fields> parameters = model.object(key);
  const double base =
      first_of({model.number("rope_theta"), model.number("rotary_emb_base"), model.number("global_rope_theta")})
          .value_or(defaults.rope_theta);
  std::optional<double> local_base =
      first_of({model.number("rope_local_base_freq"), model.number("local_rope_theta"), defaults.local_rope_theta});
  if (!local_base && defaults.model_type == std::string_view("olmo3")) {
    local_base = base;  // only its layers with full attention have a plan
  }

  const std::vector<std::string> types = parameters ? nested_types(*parameters) : std::vector<std::string>();
  if (!types.empty()) {
    check_layer_type(layer_type, types);
    const std::optional<Fields> nested = parameters->object(*layer_type);
    if (!nested) {
      fail("expected layers with rotary embedding, got layer_type '", *layer_type, "', which has null in ", key);
    }
    const double otherwise = *layer_type == kSlidingAttention ? local_base.value_or(base) : base;
    return {nested->number("rope_theta").value_or(otherwise), nested};
  }
  if (local_base) {
    check_layer_type(layer_type, {kFullAttention, kSlidingAttention});
    if (*layer_type == kSlidingAttention) {
      return {*local_base, std::nullopt};
    }
  } else if (layer_type) {
    check_layer_type(layer_type, model.strings("layer_types").value_or(std::vector<std::string>()));
  }
  return {(parameters ? parameters->number("rope_theta") : std::nullopt).value_or(base), parameters};
}

int64_t head_dim_of(const Fields& model, const ModelDefaults& defaults, const std::optional<std::string>& layer_type) {
  const bool full = layer_type && *layer_type == kFullAttention;
  const std::optional<int64_t> given = first_of(
      {model.integer("qk_rope_head_dim"), full ? model.integer("global_head_dim") : std::nullopt,
       model.integer("head_dim")});
  if (given) {
    return *given;
  }
  const auto hidden_size = first_of({model.integer("hidden_size"), model.integer("n_embd")});
  const auto num_heads = first_of({model.integer("num_attention_heads"), model.integer("n_head")});
  if (defaults.head_dim) {
    return *defaults.head_dim;
  }
  if (!hidden_size || !num_heads) {
    fail("expected head_dim, or hidden_size and num_attention_heads, in ", model.name(), ", got neither");
  }
  if (*num_heads <= 0 || *hidden_size % *num_heads != 0) {
    fail("expected a hidden_size that num_attention_heads divides, got ", *hidden_size, " and ", *num_heads);
  }
  return *hidden_size / *num_heads;
}

double partial_rotary_factor_of(const Fields& model, const ModelDefaults& defaults, const LayerRope& rope) {
  const double factor =
      first_of({rope.parameters ? rope.parameters->number("partial_rotary_factor") : std::nullopt,
                model.number("partial_rotary_factor"), model.number("rotary_pct"), model.number("rope_pct")})
          .value_or(defaults.partial_rotary_factor);
  if (!(factor > 0 && factor <= 1)) {
    fail("expected a partial_rotary_factor above 0 and at most 1, got ", factor);
  }
  return factor;
}

std::optional<int64_t> max_positions_of(const Fields& model) {
  return first_of({model.integer("max_position_embeddings"), model.integer("n_positions")});
}

/// The length that a model was trained with before it was extended. Beside the plan it comes first: Phi-3.
int64_t original_positions_of(const Fields& model, const Fields& parameters, const std::string& type) {
  const char* const key = "original_max_position_embeddings";
  return required(
      first_of({model.integer(key), parameters.integer(key), max_positions_of(model)}), key, parameters, type);
}

std::string type_of(const std::optional<Fields>& parameters) {
  if (!parameters) {
    return "default";
  }
  return first_of({parameters->string("rope_type"), parameters->string("type")}).value_or("default");
}

RotaryScaling scaling_of(const Fields& model, const LayerRope& rope, double partial_rotary_factor) {
  const std::string type = type_of(rope.parameters);
  // mrope says which axis of the positions a pair reads, not what its frequency is.
  if (type == "default" || type == "mrope") {
    return DefaultScaling();
  }
  const Fields& parameters = *rope.parameters;
  const auto factor = [&] { return required(parameters.number("factor"), "factor", parameters, type); };
  if (type == "linear") {
    return LinearScaling{factor()};
  }
  if (type == "dynamic") {
    if (const auto alpha = parameters.number("alpha"); alpha && *alpha != 0) {
      return StaticNtkScaling{*alpha};  // HunYuan
    }
    return DynamicNtkScaling{factor(), required(max_positions_of(model), "max_position_embeddings", model, type)};
  }
  if (type == "yarn") {
    YarnScaling yarn;
    yarn.original_max_position_embeddings = original_positions_of(model, parameters, type);
    if (const auto given = parameters.number("factor")) {
      yarn.factor = *given;
    } else {
      const int64_t positions = required(max_positions_of(model), "factor or max_position_embeddings", model, type);
      yarn.factor = static_cast<double>(positions) / static_cast<double>(yarn.original_max_position_embeddings);
    }
    yarn.beta_fast = parameters.number("beta_fast").value_or(yarn.beta_fast);
    yarn.beta_slow = parameters.number("beta_slow").value_or(yarn.beta_slow);
    yarn.truncate = parameters.boolean("truncate").value_or(yarn.truncate);
    yarn.attention_factor = parameters.number("attention_factor");
    yarn.mscale = parameters.number("mscale");
    yarn.mscale_all_dim = parameters.number("mscale_all_dim");
    return yarn;
  }
  if (type == "llama3") {
    const auto number = [&](const char* key) { return required(parameters.number(key), key, parameters, type); };
    return Llama3Scaling{
        factor(), number("low_freq_factor"), number("high_freq_factor"),
        original_positions_of(model, parameters, type)};
  }
  if (type == "longrope" || type == "su") {
    const auto numbers = [&](const char* key) { return required(parameters.numbers(key), key, parameters, type); };
    LongRopeScaling longrope;
    longrope.short_factor = numbers("short_factor");
    longrope.long_factor = numbers("long_factor");
    longrope.original_max_position_embeddings = original_positions_of(model, parameters, type);
    longrope.factor = parameters.number("factor");
    longrope.max_position_embeddings = max_positions_of(model);
    const auto both = parameters.number("attention_factor");
    longrope.short_attention_factor = first_of({both, parameters.number("short_mscale")});
    longrope.long_attention_factor = first_of({both, parameters.number("long_mscale")});
    return longrope;
  }
  if (type == "proportional") {
    return ProportionalScaling{partial_rotary_factor, parameters.number("factor").value_or(1.0)};
  }
  fail(
      "expected a rope type out of default, linear, dynamic, yarn, llama3, longrope (su), proportional, mrope; got '",
      type, "'");
}

void check_is_rotary(const Fields& model) {
  const std::string kind = model.string("position_embedding_type").value_or("rope");
  if (kind != "rope" && kind != "rotary") {
    fail("expected a model with rotary embedding, got position_embedding_type '", kind, "'");
  }
  if (model.boolean("alibi").value_or(false)) {
    fail("expected a model with rotary embedding, got one with alibi");
  }
}

}  // namespace

RotaryEmbeddingOptions RotaryEmbeddingOptions::from_hf_config(
    const std::string& path_or_json,
    const std::optional<std::string>& layer_type) {
  const Json json = parsed(text_of(path_or_json));
  const Fields file(json, "config.json");
  const Fields model = file.object("text_config").value_or(file);
  check_is_rotary(model);
  const std::string model_type = model.string("model_type").value_or("");
  const ModelDefaults defaults = defaults_of(model_type);

  const LayerRope rope = rope_of_layers(model, defaults, layer_type);
  const int64_t head_dim = head_dim_of(model, defaults, layer_type);
  const double partial = partial_rotary_factor_of(model, defaults, rope);

  RotaryEmbeddingOptions options(head_dim);
  options.base(rope.base)
      .interleaved(model.boolean("rope_interleave").value_or(interleaves(model_type)))
      .scaling(scaling_of(model, rope, partial));
  // Multi-head latent attention rotates a tensor of its own, and the proportional plan goes by the full head.
  const bool whole = model.has("qk_rope_head_dim") || std::holds_alternative<ProportionalScaling>(options.scaling());
  if (!whole) {
    const auto scaled = static_cast<int64_t>(static_cast<double>(head_dim) * partial);
    const int64_t rotary_dim = first_of({model.integer("rotary_dim"), defaults.rotary_dim}).value_or(scaled);
    if (rotary_dim != head_dim) {
      options.rotary_dim(rotary_dim);
    }
  }
  if (const auto sections = rope.parameters ? rope.parameters->integers("mrope_section") : std::nullopt) {
    options.sections(*sections).interleaved_sections(rope.parameters->boolean("mrope_interleaved").value_or(false));
  }
  if (const auto positions = max_positions_of(model)) {
    options.max_position_embeddings(std::min(*positions, kMostInitialRows));
  }
  return options;
}

#else

RotaryEmbeddingOptions RotaryEmbeddingOptions::from_hf_config(
    const std::string& /*path_or_json*/,
    const std::optional<std::string>& /*layer_type*/) {
  TORCH_CHECK(
      false,
      "posenc::RotaryEmbeddingOptions::from_hf_config: expected a posenc built with nlohmann_json 3.11, got one built "
      "without; install it (Debian and Ubuntu: nlohmann-json3-dev) and configure and build posenc again");
}

#endif

}  // namespace posenc
