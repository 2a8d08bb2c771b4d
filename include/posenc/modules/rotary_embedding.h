#pragma once

#include <posenc/export.h>
#include <posenc/frequencies.h>
#include <posenc/modules/detail/keeps_dtype.h>

#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

namespace posenc {

namespace detail {
class RotaryTableCache;
}

/// Order of the dimensions of the tensors given to a module: batch (b), sequence (s), head (h) and channel (d), or
/// token (t), head and channel for packed sequences.
enum class Layout { bshd, sbhd, bhsd, thd };

/// Options for `RotaryEmbedding`.
///
/// Example:
/// ```
/// posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions(128).base(500000).max_position_embeddings(8192));
/// ```
struct POSENC_API RotaryEmbeddingOptions {
  /* implicit */ RotaryEmbeddingOptions(int64_t head_dim);

  /// The options of a published model, from its Hugging Face `config.json`.
  ///
  /// Fields that the file leaves out have the defaults of its `model_type` in transformers 5.24. About 360 model types
  /// are known, with pairing, base, plan, head size, rotated part of a head, axes, and layers without rotation
  /// (`modules/detail/hf_models.json`). The function reads
  /// - the head size: `head_dim`, else `hidden_size / num_attention_heads`; `qk_rope_head_dim` for multi-head latent
  ///   attention, which rotates a separate tensor;
  /// - the base, `rope_theta`, and the rotated part of a head, `partial_rotary_factor`;
  /// - the plan, `rope_parameters` or `rope_scaling`: default, linear, dynamic, ntk, yarn, llama3, longrope and its old
  ///   name su, proportional, mrope with `mrope_section`; a field of another plan is a warning in the log;
  ///
  /// and older names of these fields. For an unknown `model_type` the file must have a field of rotary embedding; half
  /// pairing is assumed, with a warning. From a model with several parts the text model is read, in `text_config` or
  /// a similar field. For a vision encoder, pass the text of its `vision_config`.
  ///
  /// The option `max_position_embeddings` is that of the file, but at most 131072 (64 MiB of tables at 128 channels).
  /// Longer sequences grow the tables.
  ///
  /// @param path_or_json  a path, or the text of the file, which begins with `{`.
  /// @param layer_type  the type of the layers, if their frequencies differ by type (Gemma 3: `full_attention` and
  ///   `sliding_attention`). Or the number of a layer, "3", if `layer_types`, `no_rope_layers` or `layer_rope_theta`
  ///   list all layers. Default: all rotated layers, which must then be alike.
  /// @throws c10::Error  on an unreadable file, malformed JSON, missing or mistyped fields, an unknown type of plan or
  ///   layer, layers that are not rotated, and a model without rotary embedding or with one that the options cannot
  ///   express; the message names the cause. Also if the library was built without nlohmann_json.
  ///
  /// Example:
  /// ```
  /// posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions::from_hf_config("Llama-3.1-8B/config.json"));
  /// ```
  static RotaryEmbeddingOptions from_hf_config(
      const std::string& path_or_json,
      const std::optional<std::string>& layer_type = std::nullopt);

  /// Number of channels of a head, D.
  TORCH_ARG(int64_t, head_dim);
  /// Number of rotated channels, R: even, at most `head_dim`. Default: all, which requires an even `head_dim`.
  TORCH_ARG(std::optional<int64_t>, rotary_dim) = std::nullopt;
  /// Base of the frequencies, `rope_theta` of model configurations. Default: 10000.
  TORCH_ARG(double, base) = 10000.0;
  /// Number of rows of the first tables. Longer sequences grow the tables; see `RotaryEmbeddingImpl::reserve` for
  /// positions on a GPU. Default: 2048.
  TORCH_ARG(int64_t, max_position_embeddings) = 2048;
  /// Whether pairs are channels `(2i, 2i + 1)` instead of `(i, i + R/2)`. Default: false.
  TORCH_ARG(bool, interleaved) = false;
  /// Order of the dimensions of q and k. Default: `Layout::bshd`.
  TORCH_ARG(Layout, layout) = Layout::bshd;
  /// The plan that scales the frequencies for longer contexts; see `posenc/frequencies.h`. Default: `DefaultScaling`.
  TORCH_ARG(RotaryScaling, scaling) = DefaultScaling();
  /// Number of pairs of each axis of multi-axis positions, `mrope_section` of model configurations; their sum is R/2.
  /// See `mrope_pair_axes`. Default: none, positions have one axis.
  TORCH_ARG(std::vector<int64_t>, sections);
  /// Whether the sections are interleaved (Qwen3-VL) instead of consecutive (Qwen2-VL). Default: false.
  TORCH_ARG(bool, interleaved_sections) = false;
  /// The axis of multi-axis positions that each pair reads, R/2 values of 0 to 3. Replaces `sections` for pairs that
  /// are not in sections (see `grid_pair_axes`). Default: none.
  TORCH_ARG(std::vector<int64_t>, pair_axes);
  /// The index of the frequency of each pair, R/2 values of 0 to R/2 - 1: pair j has frequency `pair_frequencies[j]` of
  /// the plan. This lets axes share frequencies, as in vision encoders. Default: none, pair j has frequency j.
  TORCH_ARG(std::vector<int64_t>, pair_frequencies);
  /// Whether to rotate by the negative angle, `-position * frequency` (nanochat). Default: false.
  TORCH_ARG(bool, conjugate) = false;
  /// Whether the inverse frequencies are a parameter, `inv_freq`. Default: false.
  TORCH_ARG(bool, learnable_frequencies) = false;
};

/// Rotary position embedding (RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864) for queries and keys.
///
/// The module has no parameters, unless frequencies are learnable, and no buffers. Its tables are float32 (float64 for
/// float64 inputs) whatever dtype the model is converted to. They are built on the device of the input when they are
/// first needed, and grow by doubling. They stay allocated during the lifetime of the module and its clones, which
/// share them, because kernels in flight and captured CUDA graphs may read them. `forward` may be called from several
/// threads.
///
/// The frequencies of dynamic NTK and LongRoPE depend on the length of the sequence. This is `seq_len` if it is given,
/// else the length of the input, or the largest of positions on a CPU plus one. It is never read from a device.
/// LongRoPE has two sets of tables. Dynamic NTK has one for every length beyond its `max_position_embeddings`. Of
/// these, the four last used are kept, and those that `reserve` built or a captured graph reads. For lengths that grow
/// step by step, see `DynamicNtkScaling::seq_len_multiple`.
///
/// With `learnable_frequencies` the inverse frequencies are the parameter `inv_freq`. It is initialised by the plan of
/// the options, which must not depend on the length, and stays float32 under `to(dtype)`. Every call computes the
/// tables from it by `rotary_tables`, with float64 angles. Its gradient is deterministic.
///
/// Example:
/// ```
/// posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions(/*head_dim=*/128));
/// auto [q_rotated, k_rotated] = rope->forward(q, k);  // [B, S, H, 128]
/// ```
class POSENC_API RotaryEmbeddingImpl : public detail::KeepsDtype<RotaryEmbeddingImpl> {
 public:
  explicit RotaryEmbeddingImpl(RotaryEmbeddingOptions options_);

  /// Checks the options and selects tables that match them. Call it after a change to `options`. Learnable frequencies
  /// are initialised again.
  void reset() override;

  void pretty_print(std::ostream& stream) const override;

  /// Rotates `q` and `k` in one launch.
  ///
  /// @param q,k  in the order of dimensions of `options.layout()`; the number of heads may differ.
  /// @param positions  `[S]` or `[B, S]` (`[T]` for `Layout::thd`), int32 or int64, on the device of `q`. Default:
  ///   token s is at position s. Positions on a CPU grow the tables as needed; a negative one is an error. Positions on
  ///   a GPU are not read, as the host would have to wait. They must be below `max_position_embeddings` or the length
  ///   given to `reserve`; larger and negative ones give NaN. With `sections` or `pair_axes` a dimension of axes may
  ///   come first, `[A, B, S]` (`[A, T]`). Otherwise a token has the same position on all axes, as in plain text.
  /// @param seq_len  length of the sequence: greater than all `positions`, or without them at least the number of
  ///   tokens of q. Tables get at least this many rows. Required for positions on a GPU if frequencies depend on the
  ///   length; all other plans use it for the number of rows only.
  /// @return the rotated pair, in the same order of dimensions.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& q,
      const torch::Tensor& k,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// Rotates one tensor; arguments as in `forward`.
  torch::Tensor rotate(
      const torch::Tensor& x,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// `forward` in place: `q` and `k` are overwritten by the rotated pair; see `rotary_embedding_qk_`. An error with
  /// learnable frequencies while autograd records.
  void forward_(
      torch::Tensor& q,
      torch::Tensor& k,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// `rotate` in place; see `rotary_embedding_`.
  void rotate_(
      torch::Tensor& x,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// Splits a packed projection into rotated queries, rotated keys and values, in one launch; see
  /// `rotary_embedding_qkv`.
  ///
  /// @param qkv  `[B, S, (Hq + 2 Hk) D]` or `[B, S, 3, H, D]`; S before B with `Layout::sbhd`; T instead of B and S
  ///   with `Layout::thd`.
  /// @param num_q_heads,num_kv_heads  Hq and Hk, at least 1.
  /// @param positions,seq_len  as in `forward`.
  /// @return `(q', k', v)` in the order of dimensions of `options.layout()`.
  std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> forward_qkv(
      const torch::Tensor& qkv,
      int64_t num_q_heads,
      int64_t num_kv_heads,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// The tables that `forward` rotates with, for callers that launch the rotation themselves.
  ///
  /// @param x  `[B, S, H, D]` or `[T, H, D]`, whatever `options.layout()` is. Only its length, device and dtype are
  ///   read.
  /// @param positions,seq_len  as in `forward`.
  /// @return `(cos, sin)`, each `[P, R/2]`, with a row for each position.
  std::tuple<torch::Tensor, torch::Tensor> tables_for(
      const torch::Tensor& x,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// The argument `pair_axes` of the operators for these positions; empty if they have no dimension of axes.
  torch::IntArrayRef axes_for(const std::optional<torch::Tensor>& positions) const;

  /// Builds tables for positions 0 to `length - 1` on `device` if they do not exist. Call it before a CUDA graph is
  /// captured, and if positions on a GPU exceed `max_position_embeddings`. If frequencies depend on the length, the
  /// tables are for sequences of this `length`.
  ///
  /// With learnable frequencies no tables are built. Instead, later calls with positions on any GPU compute tables of
  /// at least `length` rows. Then do not call it while another thread is in `forward`.
  ///
  /// @param dtype  of the tensors to rotate: the tables are float64 for float64, float32 for all others.
  void reserve(int64_t length, const torch::Device& device, torch::Dtype dtype = torch::kFloat32);

  /// Number of rows of the longest tables on `device` for tensors of `dtype`; 0 before they are built. With learnable
  /// frequencies, number of rows of the tables for positions on a GPU.
  int64_t table_length(const torch::Device& device, torch::Dtype dtype = torch::kFloat32) const;

  RotaryEmbeddingOptions options;

  /// The parameter `[R/2]`, float32, if frequencies are learnable; else undefined.
  torch::Tensor inv_freq;

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {2, torch::nn::AnyValue(std::optional<torch::Tensor>())},
      {3, torch::nn::AnyValue(std::optional<int64_t>())})

 private:
  void set_pairs(int64_t num_pairs);

  std::vector<int64_t> pair_axes_;                    // from the options `sections` or `pair_axes`
  int64_t num_axes_ = 1;                              // number of axes of positions that `pair_axes_` reads
  std::shared_ptr<detail::RotaryTableCache> tables_;  // null if frequencies are learnable
  double attention_factor_ = 1.0;                     // of learnable frequencies
  int64_t rows_on_device_ = 0;                        // of learnable frequencies: table rows for positions on a GPU
};

/// A `ModuleHolder` of `RotaryEmbeddingImpl`, like the modules of LibTorch.
TORCH_MODULE(RotaryEmbedding);

}  // namespace posenc
