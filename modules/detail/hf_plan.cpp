#include "hf_plan.h"

#include <posenc/logging.h>

#include <algorithm>

namespace posenc::detail {

namespace {

/// The plans and the fields that each plan reads.
struct Plan {
  const char* type;
  std::vector<std::string> fields;
};

const std::vector<Plan>& plans() {
  static const std::vector<Plan> plans = {
      {"default", {}},
      {"linear", {"factor"}},
      {"dynamic", {"factor", "alpha"}},
      {"ntk", {"factor", "alpha"}},
      {"yarn",
       {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate"}},
      {"llama3", {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}},
      {"longrope",
       {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor", "short_mscale",
        "long_mscale"}},
      {"proportional", {"factor"}},
  };
  return plans;
}

/// Other names of plans. mrope and axial describe the axis of the positions that a pair reads, not its frequency.
std::string usual_name(const std::string& type) {
  static const std::vector<std::pair<std::string, std::string>> names = {
      {"mrope", "default"}, {"axial", "default"}, {"su", "longrope"}, {"xdrope", "dynamic"}, {"deepseek_yarn", "yarn"}};
  const auto found = std::find_if(names.begin(), names.end(), [&](const auto& name) { return name.first == type; });
  return found == names.end() ? type : found->second;
}

void warn_of_other_fields(const Plan& plan, const Fields& parameters) {
  for (const Plan& other : plans()) {
    for (const std::string& field : other.fields) {
      const auto in = [&field](const Plan& one) {
        return std::find(one.fields.begin(), one.fields.end(), field) != one.fields.end();
      };
      // A field that several plans read is reported once, for the first of them.
      const bool first = &*std::find_if(plans().begin(), plans().end(), in) == &other;
      if (first && !in(plan) && parameters.has(field)) {
        log(LogLevel::warning,
            "from_hf_config: the plan '" + std::string(plan.type) + "' does not read " + field + " = " +
                parameters.find(field)->dump());
      }
    }
  }
}

/// The length that a model was trained with before it was extended. A field beside the plan has precedence (Phi-3).
int64_t original_positions(const Fields& model, const Fields& parameters, const std::string& type) {
  const char* const key = "original_max_position_embeddings";
  return parameters.required(
      first_of({model.integer(key), parameters.integer(key), model.integer("max_position_embeddings")}), key, type);
}

YarnScaling yarn(const Fields& model, const Fields& parameters) {
  const std::string type = "yarn";
  const char* const original = "original_max_position_embeddings";
  if (!parameters.has("factor") && !parameters.has(original) && !model.has(original)) {
    fail_hf_config(
        "expected factor, ", original, " or both in ", parameters.name(),
        " for yarn, got neither: nothing says how far the model was extended");
  }
  YarnScaling scaling;
  scaling.original_max_position_embeddings = original_positions(model, parameters, type);
  if (const auto given = parameters.number("factor")) {
    scaling.factor = *given;
  } else {
    const int64_t positions =
        model.required(model.integer("max_position_embeddings"), "factor or max_position_embeddings", type);
    scaling.factor = static_cast<double>(positions) / static_cast<double>(scaling.original_max_position_embeddings);
  }
  scaling.beta_fast = parameters.number("beta_fast").value_or(scaling.beta_fast);
  scaling.beta_slow = parameters.number("beta_slow").value_or(scaling.beta_slow);
  scaling.truncate = parameters.boolean("truncate").value_or(scaling.truncate);
  scaling.attention_factor = parameters.number("attention_factor");
  scaling.mscale = parameters.number("mscale");
  scaling.mscale_all_dim = parameters.number("mscale_all_dim");
  return scaling;
}

LongRopeScaling longrope(const Fields& model, const Fields& parameters) {
  const std::string type = "longrope";
  const auto numbers = [&](const char* key) { return parameters.required(parameters.numbers(key), key, type); };
  LongRopeScaling scaling;
  scaling.short_factor = numbers("short_factor");
  scaling.long_factor = numbers("long_factor");
  scaling.original_max_position_embeddings = original_positions(model, parameters, type);
  scaling.factor = parameters.number("factor");
  scaling.max_position_embeddings = model.integer("max_position_embeddings");
  const auto both = parameters.number("attention_factor");
  scaling.short_attention_factor = first_of({both, parameters.number("short_mscale")});
  scaling.long_attention_factor = first_of({both, parameters.number("long_mscale")});
  return scaling;
}

}  // namespace

RotaryScaling hf_plan(const HfModelConfig& config, const HfLayer& layer, double part) {
  const Fields model = config.fields();
  const Fields parameters = layer.plan();
  const std::string given = first_of({parameters.string("rope_type"), parameters.string("type")}).value_or("default");
  std::string type = usual_name(given);
  if (const auto other = config.row().object("plans")) {
    type = other->string(type).value_or(type);
  }
  const auto plan = std::find_if(plans().begin(), plans().end(), [&](const Plan& one) { return one.type == type; });
  if (plan == plans().end()) {
    fail_hf_config(
        "expected a rope type out of default, linear, dynamic, ntk, yarn, llama3, longrope (su), proportional, mrope; "
        "got '",
        given, "'");
  }
  warn_of_other_fields(*plan, parameters);
  const auto number = [&](const char* key) { return parameters.required(parameters.number(key), key, type); };
  if (type == "linear") {
    return LinearScaling{number("factor")};
  }
  if (type == "dynamic" || type == "ntk") {
    if (const auto alpha = parameters.number("alpha"); alpha && *alpha != 0) {
      return StaticNtkScaling{*alpha};  // HunYuan
    }
    if (type == "ntk") {
      return StaticNtkScaling{number("factor")};
    }
    return DynamicNtkScaling{
        number("factor"), model.required(model.integer("max_position_embeddings"), "max_position_embeddings", type)};
  }
  if (type == "yarn") {
    return yarn(model, parameters);
  }
  if (type == "llama3") {
    return Llama3Scaling{
        number("factor"), number("low_freq_factor"), number("high_freq_factor"),
        original_positions(model, parameters, type)};
  }
  if (type == "longrope") {
    return longrope(model, parameters);
  }
  if (type == "proportional") {
    return ProportionalScaling{part, parameters.number("factor").value_or(1.0)};
  }
  return DefaultScaling();
}

}  // namespace posenc::detail
