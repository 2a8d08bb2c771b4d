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

/// How the dimensions of the tensors given to a module are ordered: batch, sequence, head and channel, or
/// token, head and channel for packed sequences.
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
  /// What a file leaves out is what its `model_type` implies in transformers 5.24: some 360 of them are known, with
  /// their pairing, base, plan, size of a head, part that is rotated, axes, and layers without rotation
  /// (`modules/detail/hf_models.json`). Of the file are read
  /// - the size of a head: `head_dim`, else `hidden_size / num_attention_heads`; `qk_rope_head_dim` for multi-head
  ///   latent attention, which rotates a tensor of its own;
  /// - the base, `rope_theta`, and the part that is rotated, `partial_rotary_factor`;
  /// - the plan, `rope_parameters` or `rope_scaling`: default, linear, dynamic, ntk, yarn, llama3, longrope and its old
  ///   name su, proportional, mrope with `mrope_section`; a field of another plan is a warning in the log;
  ///
  /// and older names of these. An unknown `model_type` needs a field of rotary embedding in the file, and gets half
  /// pairing and a warning. Of a model with several parts the text model is taken, from `text_config` and the like; a
  /// vision encoder is a file of its own, `vision_config`.
  ///
  /// `max_position_embeddings` becomes that of the file, at most 131072 (64 MiB of tables at 128 channels); tables grow
  /// beyond it as described there.
  ///
  /// @param path_or_json  a path, or the text of the file: what begins with `{`.
  /// @param layer_type  for models with other frequencies in some layers (Gemma 3: `full_attention` and
  ///   `sliding_attention`): which of them. Or the number of a layer, "3", where `layer_types`, `no_rope_layers` or
  ///   `layer_rope_theta` list all of them. Default: the layers that are rotated, where these are alike.
  /// @throws c10::Error  on a file that cannot be read, malformed JSON, missing or mistyped fields, an unknown type of
  ///   plan or layer, layers that are not rotated, a model without rotary embedding or with one that the options cannot
  ///   express, each named; and where the library was built without nlohmann_json.
  ///
  /// Example:
  /// ```
  /// posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions::from_hf_config("Llama-3.1-8B/config.json"));
  /// ```
  static RotaryEmbeddingOptions from_hf_config(
      const std::string& path_or_json,
      const std::optional<std::string>& layer_type = std::nullopt);

  /// Channels of one head, D.
  TORCH_ARG(int64_t, head_dim);
  /// Channels that are rotated, R: even, at most `head_dim`. Default: all, which needs an even `head_dim`.
  TORCH_ARG(std::optional<int64_t>, rotary_dim) = std::nullopt;
  /// Base of the frequencies, `rope_theta` of model configurations. Default: 10000.
  TORCH_ARG(double, base) = 10000.0;
  /// Rows of the tables when they are first built. Sequences beyond it grow the tables; see
  /// `RotaryEmbeddingImpl::reserve` for positions on a GPU. Default: 2048.
  TORCH_ARG(int64_t, max_position_embeddings) = 2048;
  /// Pairs are channels `(2i, 2i + 1)` instead of `(i, i + R/2)`. Default: false.
  TORCH_ARG(bool, interleaved) = false;
  /// Order of the dimensions of q and k. Default: `Layout::bshd`.
  TORCH_ARG(Layout, layout) = Layout::bshd;
  /// How the frequencies are stretched to longer contexts; see `posenc/frequencies.h`. Default: `DefaultScaling`.
  TORCH_ARG(RotaryScaling, scaling) = DefaultScaling();
  /// Pairs of each axis of multi-axis positions, `mrope_section` of model configurations; their sum is R/2. Default:
  /// none, and positions have one axis. See `mrope_pair_axes`.
  TORCH_ARG(std::vector<int64_t>, sections);
  /// The sections are interleaved (Qwen3-VL), not one after the other (Qwen2-VL). Default: false.
  TORCH_ARG(bool, interleaved_sections) = false;
  /// Axis of multi-axis positions that each pair reads, R/2 values of 0 to 3, in place of `sections`: for axes that are
  /// no sections (see `grid_pair_axes`). Default: none.
  TORCH_ARG(std::vector<int64_t>, pair_axes);
  /// Index of the frequency of each pair, R/2 values of 0 to R/2 - 1: pair j turns with frequency `pair_frequencies[j]`
  /// of the plan. So axes can share frequencies, as in vision encoders. Default: none, pair j has frequency j.
  TORCH_ARG(std::vector<int64_t>, pair_frequencies);
  /// Rotates by minus the angle, `-position * frequency` (nanochat). Default: false.
  TORCH_ARG(bool, conjugate) = false;
  /// The inverse frequencies are a parameter, `inv_freq`. Default: false.
  TORCH_ARG(bool, learnable_frequencies) = false;
};

/// Rotary position embedding (RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864) for queries and keys.
///
/// The module has no parameters (but see below) and no buffers: its tables are float32 (float64 for float64 inputs)
/// whatever dtype the model is converted to, are built on the device of the input when they are first needed, grow by
/// doubling, and stay allocated as long as the module or a clone of it lives, so that kernels in flight and captured
/// CUDA graphs never lose them. Clones share them. `forward` may be called from several threads.
///
/// Dynamic NTK and LongRoPE have other frequencies for longer sequences. The length is `seq_len` where it is given,
/// else that of the input or what positions on a CPU say; it is never read from a device. LongRoPE has two sets of
/// tables. Dynamic NTK has one for every length beyond its `max_position_embeddings`: the last four of these are kept,
/// and those that `reserve` built or a captured graph reads; see `DynamicNtkScaling::seq_len_multiple` for lengths
/// that grow step by step.
///
/// With `learnable_frequencies` the inverse frequencies are the parameter `inv_freq`, which starts with those of the
/// options, of a plan that does not depend on the length, and stays float32 under `to(dtype)`. Tables are then computed
/// from it in every call, with angles of float64, by `rotary_tables`, and gradients flow to it, the same bits every
/// time.
///
/// Example:
/// ```
/// posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions(/*head_dim=*/128));
/// auto [q_rotated, k_rotated] = rope->forward(q, k);  // [B, S, H, 128]
/// ```
class POSENC_API RotaryEmbeddingImpl : public detail::KeepsDtype<RotaryEmbeddingImpl> {
 public:
  explicit RotaryEmbeddingImpl(RotaryEmbeddingOptions options_);

  /// Checks the options and takes tables that match them. Call it after a change to `options`; learned frequencies
  /// start anew.
  void reset() override;

  void pretty_print(std::ostream& stream) const override;

  /// Rotates `q` and `k` in one launch.
  ///
  /// @param q,k  in the order of dimensions of `options.layout()`; number of heads may differ.
  /// @param positions  `[S]`, `[B, S]` (`[T]` for `Layout::thd`), int32 or int64, on the device of `q`. Default:
  ///   token s is at position s. Positions on a CPU grow the tables as needed; a negative one is an error. Those on a
  ///   GPU cannot be read without waiting for it: they must be below `max_position_embeddings` or what `reserve` was
  ///   given. Beyond that, and below 0, they give NaN. With `sections` or `pair_axes` there may be an axis in front,
  ///   `[A, B, S]` (`[A, T]`);
  ///   fewer dimensions, or no positions, mean the same position on every axis, as plain text has it.
  /// @param seq_len  positions of the sequence: more than any of `positions`, at least the tokens of q without them.
  ///   Tables get as many rows. Needed for positions on a GPU where frequencies depend on the length; not read by
  ///   other plans for anything but the rows.
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

  /// `forward` in place: `q` and `k` become the rotated pair; see `rotary_embedding_qk_`. Not with learnable
  /// frequencies while a graph is recorded.
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
  /// @param qkv  `[B, S, (Hq + 2 Hk) D]` or `[B, S, 3, H, D]`; with `Layout::sbhd`, S before B; with `Layout::thd`, T
  ///   in place of both.
  /// @param positions,seq_len  as in `forward`.
  /// @return `(q', k', v)` in the order of dimensions of `options.layout()`.
  std::tuple<torch::Tensor, torch::Tensor, torch::Tensor> forward_qkv(
      const torch::Tensor& qkv,
      int64_t num_q_heads,
      int64_t num_kv_heads,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// The tables that `forward` rotates with, for operators that do it themselves.
  ///
  /// @param x  `[B, S, H, D]` or `[T, H, D]`, whatever `options.layout()` is: its length, device and dtype count.
  /// @param positions,seq_len  as in `forward`.
  /// @return `(cos, sin)`, with a row for each position.
  std::tuple<torch::Tensor, torch::Tensor> tables_for(
      const torch::Tensor& x,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  /// The axis of `positions` that each pair reads, the `pair_axes` of the operators: none where these have one.
  torch::IntArrayRef axes_for(const std::optional<torch::Tensor>& positions) const;

  /// Makes sure that tables for positions 0 to `length - 1` exist on `device`. Call it before a CUDA graph is
  /// captured, and where positions on a GPU go beyond `max_position_embeddings`. Where frequencies depend on the
  /// length, the tables are those of sequences of this `length`.
  ///
  /// With learnable frequencies nothing is built: tables of later calls with positions on a GPU, any of them, have
  /// `length` rows where that is more than `max_position_embeddings`. Not while another thread is in `forward`.
  ///
  /// @param dtype  of the tensors to rotate: the tables are float64 for float64, float32 for all others.
  void reserve(int64_t length, const torch::Device& device, torch::Dtype dtype = torch::kFloat32);

  /// Rows of the tables on `device` for tensors of `dtype`, of the longest where there are several; 0 before they are
  /// built. With learnable frequencies, rows of the tables of a call with positions on a GPU.
  int64_t table_length(const torch::Device& device, torch::Dtype dtype = torch::kFloat32) const;

  RotaryEmbeddingOptions options;

  /// The parameter `[R/2]`, float32, where frequencies are learnable; else undefined.
  torch::Tensor inv_freq;

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {2, torch::nn::AnyValue(std::optional<torch::Tensor>())},
      {3, torch::nn::AnyValue(std::optional<int64_t>())})

 private:
  void set_pairs(int64_t num_pairs);

  std::vector<int64_t> pair_axes_;                    // of the sections, or those of the options
  int64_t num_axes_ = 1;                              // of positions, as many as pair_axes_ reads
  std::shared_ptr<detail::RotaryTableCache> tables_;  // where frequencies are fixed
  double attention_factor_ = 1.0;                     // where they are learnable
  int64_t rows_on_device_ = 0;                        // there too: of the tables for positions on a GPU
};

/// A `ModuleHolder` of `RotaryEmbeddingImpl`, as LibTorch's own modules are.
TORCH_MODULE(RotaryEmbedding);

}  // namespace posenc
