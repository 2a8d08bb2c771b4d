// RotaryEmbeddingOptions::from_hf_config. The facts about each model_type are in detail/hf_models.json.
#include <posenc/modules/rotary_embedding.h>

#include <c10/util/Exception.h>

#if POSENC_JSON
#include "detail/hf_model_config.h"
#include "detail/hf_plan.h"

#include <posenc/logging.h>
#include <posenc/pair_axes.h>

#include <algorithm>
#include <utility>
#endif

namespace posenc {

#if POSENC_JSON

namespace {

using detail::fail_hf_config;
using detail::Fields;
using detail::first_of;
using detail::HfLayer;
using detail::HfModelConfig;
using detail::Json;

/// The largest number of rows of the initial tables. Llama 4 has ten million positions, which would be 5 GB of tables.
constexpr int64_t kMostInitialRows = 131072;

/// The number of channels of the tensors that are rotated.
int64_t head_dim_of(const HfModelConfig& model, const HfLayer& layer, double part) {
  const Fields fields = model.fields();
  const Json overrides = model.overrides_of(layer);
  const Fields own(overrides, "per_layer_config");
  const bool full = layer.type == detail::kFullAttention;
  const std::optional<int64_t> head_dim = first_of(
      {own.integer("head_dim"), full ? fields.integer("global_head_dim") : std::nullopt, fields.integer("head_dim")});
  const std::optional<int64_t> of_rotation =
      first_of({own.integer("qk_rope_head_dim"), fields.integer("qk_rope_head_dim")});
  if (of_rotation) {
    return *of_rotation;
  }
  if (head_dim) {
    return model.row().boolean("tail").value_or(false) ? static_cast<int64_t>(static_cast<double>(*head_dim) * part)
                                                       : *head_dim;
  }
  const auto hidden_size = fields.integer("hidden_size");
  const auto num_heads = first_of({own.integer("num_attention_heads"), fields.integer("num_attention_heads")});
  if (!hidden_size || !num_heads) {
    fail_hf_config("expected head_dim, or hidden_size and num_attention_heads, in ", fields.name(), ", got neither");
  }
  const int64_t channels = *hidden_size * model.row().integer("head_factor").value_or(1);
  // transformers rounds down. A hidden_size that is no multiple of the number of heads is an error in the file.
  if (*num_heads <= 0 || channels % *num_heads != 0) {
    fail_hf_config("expected a hidden_size that num_attention_heads divides, got ", *hidden_size, " and ", *num_heads);
  }
  return channels / *num_heads;
}

void set_pairing(RotaryEmbeddingOptions& options, const HfModelConfig& model) {
  const std::string pairing = model.row().string("pairing").value_or("half");
  const Fields fields = model.fields();
  options.conjugate(pairing == "conjugate")
      .interleaved(first_of({fields.boolean("rope_interleave"), fields.boolean("rotary_emb_interleaved")})
                       .value_or(pairing == "interleaved"));
}

void set_rotary_dim(RotaryEmbeddingOptions& options, const HfModelConfig& model, double part) {
  const Fields fields = model.fields();
  // Multi-head latent attention rotates a separate tensor. The proportional plan uses the full head.
  if (fields.has("qk_rope_head_dim") || model.row().has("tail") ||
      std::holds_alternative<ProportionalScaling>(options.scaling())) {
    return;
  }
  const auto scaled = static_cast<int64_t>(static_cast<double>(options.head_dim()) * part);
  const int64_t rotary_dim = fields.integer("rotary_dim").value_or(scaled);
  if (rotary_dim <= 0 || rotary_dim > options.head_dim() || rotary_dim % 2 != 0) {
    fail_hf_config(
        "expected an even number of rotated channels from 2 to head_dim = ", options.head_dim(), ", got ", rotary_dim,
        fields.has("rotary_dim") ? " (rotary_dim)" : " (of partial_rotary_factor)");
  }
  if (rotary_dim != options.head_dim()) {
    options.rotary_dim(rotary_dim);
  }
}

/// Axes and frequencies of pairs for a grid of patches. Each axis has half of the pairs.
void set_grid(RotaryEmbeddingOptions& options, const std::string& axes, int64_t num_pairs) {
  if (!std::holds_alternative<DefaultScaling>(options.scaling())) {
    fail_hf_config("expected the default plan for positions on a grid, got ", to_string(options.scaling()));
  }
  const int64_t half = num_pairs / 2;
  if (num_pairs % 2 != 0) {
    fail_hf_config("expected as many pairs of channels for the height as for the width, got ", num_pairs, " pairs");
  }
  const bool alternating = axes == "grid_alternating_wh";
  std::vector<int64_t> pair_axes = grid_pair_axes(num_pairs, alternating);
  std::vector<int64_t> frequencies;
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t of_axis = alternating ? pair / 2 : pair % half;
    frequencies.push_back(2 * of_axis + (axes == "grid_strided" ? pair / half : 0));
  }
  if (axes == "grid_wh" || alternating) {
    std::transform(pair_axes.begin(), pair_axes.end(), pair_axes.begin(), [](int64_t axis) { return 1 - axis; });
  }
  options.pair_axes(std::move(pair_axes)).pair_frequencies(std::move(frequencies));
}

/// The axis of the positions that each pair reads.
void set_axes(RotaryEmbeddingOptions& options, const HfModelConfig& model, const HfLayer& layer) {
  const int64_t num_pairs = options.rotary_dim().value_or(options.head_dim()) / 2;
  const Fields plan = layer.plan();
  const bool interleaved = plan.boolean("mrope_interleaved").value_or(false);
  const std::string axes = model.row().string("axes").value_or(interleaved ? "interleaved" : "sections");
  if (axes.rfind("grid", 0) == 0) {
    set_grid(options, axes, num_pairs);
    return;
  }
  if (axes == "alternating") {
    options.pair_axes(grid_pair_axes(num_pairs, /*alternating=*/true));
    return;
  }
  const auto sections =
      first_of({plan.integers("mrope_section"), plan.integers("xdrope_section"), model.row().integers("sections")});
  if (!sections) {
    return;
  }
  if (axes == "none") {
    log(LogLevel::warning,
        "from_hf_config: '" + model.type() + "' gives the two channels of a pair different axes (mrope_section): the " +
            "options are those of text, whose axes all have the same positions");
    return;
  }
  int64_t sum = 0;
  for (const int64_t section : *sections) {
    sum += section;
  }
  if (axes == "interleaved" && sections->size() == 3 && sum != num_pairs) {
    // Sections that do not add up to R/2: axis 0 has the remaining pairs, as in transformers.
    std::vector<int64_t> pair_axes;
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      const int64_t axis = pair % 3;
      pair_axes.push_back(axis != 0 && pair < 3 * sections->at(static_cast<size_t>(axis)) ? axis : 0);
    }
    options.pair_axes(std::move(pair_axes));
    return;
  }
  if (sum != num_pairs) {
    fail_hf_config(
        "expected an mrope_section that adds up to half the rotated channels, ", num_pairs, ", got ",
        c10::IntArrayRef(*sections));
  }
  if (axes == "hwt") {
    if (sections->size() != 3 || sections->at(0) != sections->at(1)) {
      fail_hf_config("expected an mrope_section of three, the first two alike, got ", c10::IntArrayRef(*sections));
    }
    std::vector<int64_t> pair_axes(static_cast<size_t>(num_pairs), 0);
    for (int64_t pair = 0; pair < 2 * sections->at(0); ++pair) {
      pair_axes[static_cast<size_t>(pair)] = 1 + pair % 2;
    }
    options.pair_axes(std::move(pair_axes));
    return;
  }
  options.sections(*sections).interleaved_sections(axes == "interleaved");
}

}  // namespace

RotaryEmbeddingOptions RotaryEmbeddingOptions::from_hf_config(
    const std::string& path_or_json,
    const std::optional<std::string>& layer_type) {
  const HfModelConfig model(path_or_json);
  const HfLayer layer = model.layer(layer_type);
  const double part = model.part(layer);

  RotaryEmbeddingOptions options(head_dim_of(model, layer, part));
  options.base(model.base(layer)).scaling(detail::hf_plan(model, layer, part));
  set_pairing(options, model);
  set_rotary_dim(options, model, part);
  set_axes(options, model, layer);
  if (const auto positions = model.fields().integer("max_position_embeddings")) {
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
