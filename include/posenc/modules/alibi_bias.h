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

  /// Number of heads of the scores of this module, H.
  TORCH_ARG(int64_t, num_heads);
  /// Whether to hide the keys beyond the position of the query. Default: false.
  TORCH_ARG(bool, causal) = false;
  /// Negative exponent of the last published slope, `2^(-max_bias)`; see `alibi_slopes`. Default: 8, as in the paper.
  TORCH_ARG(double, max_bias) = 8.0;
  /// Custom slopes instead of the published ones, `[total_heads]` of a floating dtype; copied as float32. Default:
  /// undefined, the published slopes.
  TORCH_ARG(torch::Tensor, slopes);
  /// Whether the slopes are a parameter, `slopes`. Default: false.
  TORCH_ARG(bool, learnable) = false;
  /// With tensor parallelism: index of the first head of this module in the whole model. Default: 0.
  TORCH_ARG(int64_t, head_offset) = 0;
  /// With tensor parallelism: number of heads of the whole model. This module has slopes `head_offset` to
  /// `head_offset + num_heads - 1` of the whole model. Default: `num_heads`.
  TORCH_ARG(std::optional<int64_t>, total_heads) = std::nullopt;
};

/// Attention with linear biases (ALiBi, Press et al. 2021, https://arxiv.org/abs/2108.12409).
///
/// Slopes are float32, also for float64 scores and whatever dtype the model is converted to: a slope of up to 1 that is
/// rounded to bfloat16 changes the bias by up to 16 at distance 8192. Learnable slopes are the parameter `slopes`,
/// which `to(dtype)` leaves float32. Fixed slopes are neither parameter nor buffer. The first call on a device copies
/// them there; later calls and clones of the module use that copy. A first call during the capture of a CUDA graph is
/// an error: call `slopes_on(device)` before the capture. `forward` and `clone` may be called from several threads at
/// the same time.
///
/// Example:
/// ```
/// posenc::ALiBiBias alibi(posenc::ALiBiBiasOptions(/*num_heads=*/12).causal(true));
/// auto probabilities = alibi->softmax(at::matmul(q, k.transpose(-1, -2)), 1 / std::sqrt(head_dim));
/// ```
class POSENC_API ALiBiBiasImpl : public detail::KeepsDtype<ALiBiBiasImpl> {
 public:
  explicit ALiBiBiasImpl(ALiBiBiasOptions options_);

  /// Checks the options and selects slopes that match them. Call it after a change to `options`. Learnable slopes are
  /// initialised again.
  void reset() override;

  void pretty_print(std::ostream& stream) const override;

  /// `scores + bias`, in one pass. Scores are `[B, H, Sq, Sk]` or `[H, Sq, Sk]`; the last query is at the last key.
  torch::Tensor forward(const torch::Tensor& scores);

  /// The same with query 0 at key position `query_offset`. Default: `Sk - Sq`.
  torch::Tensor add(const torch::Tensor& scores, std::optional<int64_t> query_offset = std::nullopt);

  /// The bias as a tensor `[H, q_len, k_len]` on `device`. Default: the device of learnable slopes, else the CPU.
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

  /// Attention with the bias; see `posenc::alibi_attention`. q is `[B, Sq, H, D]` or packed `[T, H, D]`, where H is
  /// `num_heads`. The module determines `causal`; if it is not causal, `causal` in `attention_options` is an error.
  torch::Tensor attention(
      const torch::Tensor& q,
      const torch::Tensor& k,
      const torch::Tensor& v,
      const ALiBiAttentionOptions& attention_options = {});

  /// The same with the log-sum-exp of each row; see `posenc::alibi_attention_with_lse`.
  std::tuple<torch::Tensor, torch::Tensor> attention_with_lse(
      const torch::Tensor& q,
      const torch::Tensor& k,
      const torch::Tensor& v,
      const ALiBiAttentionOptions& attention_options = {});

  /// The slopes `[H]`, float32, on `device`. Fixed slopes are copied there if there is no copy yet; call it before a
  /// CUDA graph is captured. Learnable slopes are the parameter, which must be on `device`.
  torch::Tensor slopes_on(const torch::Device& device);

  ALiBiBiasOptions options;

  /// The parameter `[H]`, float32, if slopes are learnable; else undefined.
  torch::Tensor slopes;

 private:
  class FixedSlopes;
  std::shared_ptr<FixedSlopes> fixed_;
};

/// A `ModuleHolder` of `ALiBiBiasImpl`, like the modules of LibTorch.
TORCH_MODULE(ALiBiBias);

}  // namespace posenc
