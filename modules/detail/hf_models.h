#pragma once

#include "json_fields.h"

#include <string>

/// Facts about each model_type of Hugging Face configurations: hf_models.json, one line for each model_type.
///
/// They are taken from the configuration and modelling classes of transformers 5.24, or from published files for models
/// that transformers does not contain. A new model is one more line. All its fields are optional:
///
/// - `defaults`: values of fields that a file may leave out.
/// - `names`: another name of a field, or null if the model does not read it: `{"head_dim": "kv_channels"}`.
/// - `pairing`: `interleaved`, or `conjugate` for half pairing with the angle `-p w`. Default: half pairing.
/// - `base`: default of `rope_theta`, for all layers or by layer type. Default: 10000.
/// - `part`: default of `partial_rotary_factor`, for all layers or by layer type. Default: 1.
/// - `rope_parameters`: default of the plan; nested by layer type if layers differ.
/// - `plans`: types of plans that mean another plan: `{"yarn": "longrope"}`.
/// - `flat_plan`: the layer type of a plan that is not nested by layer type, or `all`. Default: `full_attention`.
/// - `layer_types`: names of the layer types.
/// - `unrotated`: layer types without rotary embedding; `unrotated_with`: only if this field is set.
/// - `per_layer_type`: the layer type of `per_layer_config` if there are no `layer_types`.
/// - `requires`: values of fields; if a field has another value, the model has no rotary embedding.
/// - `axes`: assignment of pairs to axes of the positions: `sections`, `interleaved` (sections as in Qwen3-VL), `hwt`
///   (ERNIE 4.5 VL), `alternating`, `grid`, `grid_wh`, `grid_alternating_wh`, `grid_strided` (Pixtral) or `none`.
///   Default: `sections`, or `interleaved` if the file sets `mrope_interleaved`.
/// - `sections`: default of `mrope_section`.
/// - `head_factor`: number of channels of a head divided by `hidden_size / num_attention_heads`.
/// - `tail`: the last `partial_rotary_factor * head_dim` channels of a head are rotated, as a separate tensor.
/// - `text`: the model_type of the contained text model. The other fields are for files that leave it out.
/// - `like`: the model_type whose line provides all fields that this line lacks.
/// - `error`: the reason why `from_hf_config` cannot return options for the model.
namespace posenc::detail {

/// The line of `model_type`, completed by that of `like`; an empty object if there is none.
Json hf_model(const std::string& model_type);

}  // namespace posenc::detail
