#pragma once

#include <posenc/alibi_attention.h>
#include <posenc/export.h>
#include <posenc/modules/detail/keeps_dtype.h>

#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <tuple>

namespace posenc {

/// Options for `ALiBiBias`.
///
/// Example:
/// ```
/// posenc::ALiBiBias alibi(posenc::ALiBiBiasOptions(/*num_heads=*/12).causal(true));
/// ```
struct POSENC_API ALiBiBiasOptions {
  /* implicit */ ALiBiBiasOptions(int64_t num_heads);

  /// Heads of the scores that this module sees, H.
  TORCH_ARG(int64_t, num_heads);
  /// Hide the keys beyond the position of the query. Default: false.
  TORCH_ARG(bool, causal) = false;
  /// Exponent of the last of the published slopes. Default: 8.
  TORCH_ARG(double, max_bias) = 8.0;
  /// Slopes of your own instead of the published ones, `[total_heads]` of a floating dtype; copied, as float32.
  /// Default: undefined.
  TORCH_ARG(torch::Tensor, slopes);
  /// Slopes are a parameter, `slopes`. Default: false.
  TORCH_ARG(bool, learnable) = false;
  /// First head of the whole model that this module serves, for tensor parallelism. Default: 0.
  TORCH_ARG(int64_t, head_offset) = 0;
  /// Heads of the whole model: this module has slopes `head_offset` to `head_offset + num_heads - 1` of those that it
  /// would have alone. Default: `num_heads`.
  TORCH_ARG(std::optional<int64_t>, total_heads) = std::nullopt;
};

/// Attention with linear biases (ALiBi, Press et al. 2021, https://arxiv.org/abs/2108.12409).
///
/// Slopes are float32 whatever dtype the model is converted to. Learnable ones are the parameter `slopes`, which
/// `to(dtype)` leaves float32: bfloat16 holds a slope with 8 bits, an error of 30 at distance 8192 (float64 scores are
/// served by them too). Fixed ones are neither parameter nor buffer: they are copied to the device of the scores when
/// they are first needed there, and shared by clones. While a CUDA graph is captured that copy is an error: call
/// `slopes_on` before. `forward` may be called from several threads, and `clone` beside it.
///
/// Example:
/// ```
/// posenc::ALiBiBias alibi(posenc::ALiBiBiasOptions(/*num_heads=*/12).causal(true));
/// auto probabilities = alibi->softmax(at::matmul(q, k.transpose(-1, -2)), 1 / std::sqrt(head_dim));
/// ```
class POSENC_API ALiBiBiasImpl : public detail::KeepsDtype<ALiBiBiasImpl> {
 public:
  explicit ALiBiBiasImpl(ALiBiBiasOptions options_);

  /// Checks the options and takes slopes that match them. Call it after a change to `options`; learned slopes start
  /// anew.
  void reset() override;

  void pretty_print(std::ostream& stream) const override;

  /// `scores + bias`, in one pass. Scores are `[B, H, Sq, Sk]` or `[H, Sq, Sk]`; the last query sits at the last key.
  torch::Tensor forward(const torch::Tensor& scores);

  /// The same with query 0 at key position `query_offset`.
  torch::Tensor add(const torch::Tensor& scores, std::optional<int64_t> query_offset = std::nullopt);

  /// The bias itself, `[H, q_len, k_len]`, on `device`: default that of learnable slopes, else the CPU.
  torch::Tensor bias(
      int64_t q_len,
      int64_t k_len,
      torch::Dtype dtype = torch::kFloat32,
      std::optional<torch::Device> device = std::nullopt,
      std::optional<int64_t> query_offset = std::nullopt);

  /// `softmax(scale * scores + bias + mask)` over the keys in one pass; see `posenc::alibi_softmax`.
  torch::Tensor softmax(
      const torch::Tensor& scores,
      double scale = 1.0,
      const std::optional<torch::Tensor>& key_padding_mask = std::nullopt,
      std::optional<int64_t> query_offset = std::nullopt);

  /// Attention with the bias inside; see `posenc::alibi_attention`. q is `[B, Sq, H, D]` or packed `[T, H, D]` with the
  /// H of this module. Whether it is causal is a matter of the module: `attention_options` need not say so.
  torch::Tensor attention(
      const torch::Tensor& q,
      const torch::Tensor& k,
      const torch::Tensor& v,
      const ALiBiAttentionOptions& attention_options = {});

  /// The same with the logarithms of sums of exponentials; see `posenc::alibi_attention_with_lse`.
  std::tuple<torch::Tensor, torch::Tensor> attention_with_lse(
      const torch::Tensor& q,
      const torch::Tensor& k,
      const torch::Tensor& v,
      const ALiBiAttentionOptions& attention_options = {});

  /// The slopes `[H]`, float32, on `device`. Fixed slopes are copied there now if they were not; call it before a
  /// CUDA graph is captured. Learnable ones are the parameter, which must be there already.
  torch::Tensor slopes_on(const torch::Device& device);

  ALiBiBiasOptions options;

  /// The parameter, where slopes are learnable; else undefined.
  torch::Tensor slopes;

 private:
  class FixedSlopes;
  std::shared_ptr<FixedSlopes> fixed_;
};

/// A `ModuleHolder` of `ALiBiBiasImpl`, as LibTorch's own modules are.
TORCH_MODULE(ALiBiBias);

}  // namespace posenc
