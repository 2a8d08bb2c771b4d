#pragma once

#include <posenc/export.h>
#include <posenc/modules/rotary_embedding.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <tuple>

namespace posenc {

/// Options for `QKNormRotaryEmbedding`.
///
/// Example:
/// ```
/// // Qwen3
/// posenc::QKNormRotaryEmbeddingOptions(posenc::RotaryEmbeddingOptions(128).base(1000000));
/// // Gemma 3, layers of global attention
/// posenc::QKNormRotaryEmbeddingOptions(posenc::RotaryEmbeddingOptions(256).base(1000000)).unit_offset(true);
/// ```
struct POSENC_API QKNormRotaryEmbeddingOptions {
  /// Heads of `head_dim` channels, with the default `RotaryEmbeddingOptions`.
  /* implicit */ QKNormRotaryEmbeddingOptions(int64_t head_dim);
  /* implicit */ QKNormRotaryEmbeddingOptions(RotaryEmbeddingOptions rotary);

  /// Options of the rotation, which include the head size and the order of the dimensions of q and k.
  TORCH_ARG(RotaryEmbeddingOptions, rotary);
  /// Added to the mean square; `rms_norm_eps` of model configurations. Positive. Default: 1e-6.
  TORCH_ARG(double, eps) = 1e-6;
  /// Whether the weights are `1 + w` (Gemma 3) instead of `w` (Qwen3). Default: false.
  TORCH_ARG(bool, unit_offset) = false;
};

/// RMSNorm over each head of queries and keys, then the rotary embedding, in one pass over both: see
/// `qk_norm_rotary_embedding`.
///
/// Its parameters are `q_weight` and `k_weight`, `[head_dim]`, initially ones, or zeros with `unit_offset`. `to(dtype)`
/// converts them like any parameter. q and k must have the dtype of the weights; float32 weights also accept float16
/// and bfloat16. The rotation is the submodule `rotary`, whose tables are never converted.
///
/// Example:
/// ```
/// posenc::QKNormRotaryEmbedding qk_norm(posenc::RotaryEmbeddingOptions(/*head_dim=*/128).base(1000000));
/// auto [q_out, k_out] = qk_norm->forward(q, k);  // [B, S, Hq, 128], [B, S, Hk, 128]
/// ```
class POSENC_API QKNormRotaryEmbeddingImpl : public torch::nn::Cloneable<QKNormRotaryEmbeddingImpl> {
 public:
  explicit QKNormRotaryEmbeddingImpl(QKNormRotaryEmbeddingOptions options_);

  /// Checks the options and initialises the parameters. Call it after a change to `options`.
  void reset() override;

  void pretty_print(std::ostream& stream) const override;

  /// Normalises and rotates `q` and `k` in one launch.
  ///
  /// @param q,k,positions,seq_len  as in `RotaryEmbeddingImpl::forward`.
  /// @return the normalised and rotated pair, in the same order of dimensions.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& q,
      const torch::Tensor& k,
      const std::optional<torch::Tensor>& positions = std::nullopt,
      std::optional<int64_t> seq_len = std::nullopt);

  QKNormRotaryEmbeddingOptions options;

  torch::Tensor q_weight, k_weight;

  /// The rotation. `rotary->reserve` builds longer tables.
  RotaryEmbedding rotary = nullptr;

 protected:
  FORWARD_HAS_DEFAULT_ARGS(
      {2, torch::nn::AnyValue(std::optional<torch::Tensor>())},
      {3, torch::nn::AnyValue(std::optional<int64_t>())})
};

/// A `ModuleHolder` of `QKNormRotaryEmbeddingImpl`, like the modules of LibTorch.
TORCH_MODULE(QKNormRotaryEmbedding);

}  // namespace posenc
