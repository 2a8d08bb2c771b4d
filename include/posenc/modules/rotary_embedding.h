#pragma once

#include <posenc/export.h>
#include <posenc/modules/detail/keeps_dtype.h>

#include <torch/nn/modules/common.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <ostream>
#include <tuple>

namespace posenc {

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

  /// Channels of one head, D.
  TORCH_ARG(int64_t, head_dim);
  /// Channels that are rotated, R: even, at most `head_dim`. Default: all, which needs an even `head_dim`.
  TORCH_ARG(std::optional<int64_t>, rotary_dim) = std::nullopt;
  /// Base of the frequencies, `rope_theta` of model configurations. Default: 10000.
  TORCH_ARG(double, base) = 10000.0;
  /// Rows of the tables when they are first built. Sequences beyond it grow the tables; see `RotaryEmbeddingImpl::reserve`
  /// for positions on a GPU. Default: 2048.
  TORCH_ARG(int64_t, max_position_embeddings) = 2048;
  /// Pairs are channels `(2i, 2i + 1)` instead of `(i, i + R/2)`. Default: false.
  TORCH_ARG(bool, interleaved) = false;
  /// Order of the dimensions of q and k. Default: `Layout::bshd`.
  TORCH_ARG(Layout, layout) = Layout::bshd;
  /// The inverse frequencies are a parameter, `inv_freq`. Default: false.
  TORCH_ARG(bool, learnable_frequencies) = false;
};

/// Rotary position embedding (RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864) for queries and keys.
///
/// The module has no parameters (but see below) and no buffers: its tables are float32 (float64 for float64 inputs) whatever
/// dtype the model is converted to, are built on the device of the input when they are first needed, grow by
/// doubling, and stay allocated as long as the module or a clone of it lives, so that kernels in flight and captured CUDA
/// graphs never lose them. Clones share them. `forward` may be called from several threads.
///
/// With `learnable_frequencies` the inverse frequencies are the parameter `inv_freq`, which starts with those of the
/// options and stays float32 under `to(dtype)`. Tables are then computed from it in every call, with angles of float64,
/// by `rotary_tables`, and gradients flow to it, the same bits every time.
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
  ///   token s is at position s. Positions on a CPU grow the tables as needed. Those on a GPU cannot be read
  ///   without waiting for it: they must be below `max_position_embeddings` or what `reserve` was given, and
  ///   beyond that give NaN.
  /// @return the rotated pair, in the same order of dimensions.
  std::tuple<torch::Tensor, torch::Tensor> forward(
      const torch::Tensor& q,
      const torch::Tensor& k,
      const std::optional<torch::Tensor>& positions = std::nullopt);

  /// Rotates one tensor; arguments as in `forward`.
  torch::Tensor rotate(const torch::Tensor& x, const std::optional<torch::Tensor>& positions = std::nullopt);

  /// The tables that `forward` rotates with, for operators that do it themselves.
  ///
  /// @param x  `[B, S, H, D]` or `[T, H, D]`, whatever `options.layout()` is: its length, device and dtype count.
  /// @param positions  as in `forward`.
  /// @return `(cos, sin)`, with a row for each position.
  std::tuple<torch::Tensor, torch::Tensor> tables_for(
      const torch::Tensor& x,
      const std::optional<torch::Tensor>& positions = std::nullopt);

  /// Makes sure that tables for positions 0 to `length - 1` exist on `device`. Call it before a CUDA graph is
  /// captured, and where positions on a GPU go beyond `max_position_embeddings`.
  ///
  /// With learnable frequencies nothing is built: tables of later calls with positions on a GPU, any of them, have
  /// `length` rows where that is more than `max_position_embeddings`. Not while another thread is in `forward`.
  ///
  /// @param dtype  of the tensors to rotate: the tables are float64 for float64, float32 for all others.
  void reserve(int64_t length, const torch::Device& device, torch::Dtype dtype = torch::kFloat32);

  /// Rows of the tables on `device` for tensors of `dtype`, 0 before they are built. With learnable frequencies, rows
  /// of the tables of a call with positions on a GPU.
  int64_t table_length(const torch::Device& device, torch::Dtype dtype = torch::kFloat32) const;

  RotaryEmbeddingOptions options;

  /// The parameter `[R/2]`, float32, where frequencies are learnable; else undefined.
  torch::Tensor inv_freq;

 protected:
  FORWARD_HAS_DEFAULT_ARGS({2, torch::nn::AnyValue(std::optional<torch::Tensor>())})

 private:
  class Tables;
  std::shared_ptr<Tables> tables_;  // where frequencies are fixed
  int64_t rows_on_device_ = 0;      // where they are learnable: of the tables for positions on a GPU
};

/// A `ModuleHolder` of `RotaryEmbeddingImpl`, as LibTorch's own modules are.
TORCH_MODULE(RotaryEmbedding);

}  // namespace posenc
