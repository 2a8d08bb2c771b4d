#pragma once

#include "json_fields.h"

#include <string>

/// What a model_type of Hugging Face configurations implies: hf_models.json, one line for each model_type.
///
/// The facts are those of the configuration and modelling classes of transformers 5.24, and of published files where
/// the model is not part of it. A new model is one more line. Its fields, all of them optional:
///
/// - `defaults`: values of fields that a file may leave out.
/// - `names`: for a field of this library, the one that takes its place, or null where the model does not read it:
///   `{"head_dim": "kv_channels"}`.
/// - `pairing`: `interleaved`, or `conjugate` for half pairing with the angle `-p w`. Default: half pairing.
/// - `base`: default of `rope_theta`, for all layers or by layer type. Default: 10000.
/// - `part`: default of `partial_rotary_factor`, for all layers or by layer type. Default: 1.
/// - `rope_parameters`: the plan of a file that has none; nested by layer type where layers differ.
/// - `plans`: types of plans that mean another one: `{"yarn": "longrope"}`.
/// - `flat_plan`: the layer type that a plan belongs to which is not nested by layer type, or `all`. Default:
///   `full_attention`.
/// - `layer_types`: names of the kinds of layers.
/// - `unrotated`: kinds of layers without rotary embedding; `unrotated_with`: only where this field is set.
/// - `per_layer_type`: the layer type that `per_layer_config` is about where there are no `layer_types`.
/// - `requires`: values that fields must have for the model to be rotary.
/// - `axes`: how the pairs read positions of several axes: `sections`, `interleaved` (sections as in Qwen3-VL), `hwt`
///   (ERNIE 4.5 VL), `alternating`, `grid`, `grid_wh`, `grid_alternating_wh`, `grid_strided` (Pixtral) or `none`.
///   Default: `sections`, or what the file's `mrope_interleaved` says.
/// - `sections`: default of `mrope_section`.
/// - `head_factor`: a head has this many times `hidden_size / num_attention_heads` channels.
/// - `tail`: the last channels of a head are rotated, as a tensor of their own of `partial_rotary_factor * head_dim`.
/// - `text`: the model_type of the text model within. The other fields of the line are for files that leave it out.
/// - `like`: the model_type whose line is meant as well; fields of this line come first.
/// - `error`: why there are no options.
namespace posenc::detail {

/// The line of `model_type` with that of `like` under it; an empty object where there is none.
Json hf_model(const std::string& model_type);

}  // namespace posenc::detail
