#pragma once

#include <posenc/modules/rotary_embedding.h>

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>

/// Causal self-attention with rotary position embedding of queries and keys.
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(int64_t channels, int64_t num_heads);

  /// `[B, S, channels]` to the same shape.
  torch::Tensor forward(const torch::Tensor& x);

 private:
  int64_t num_heads_;
  torch::nn::Linear qkv_, out_;
  posenc::RotaryEmbedding rope_;
};
TORCH_MODULE(Attention);

/// Attention and a two-layer perceptron, each with LayerNorm before it and a residual connection.
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(int64_t channels, int64_t num_heads);
  torch::Tensor forward(const torch::Tensor& x);

 private:
  torch::nn::LayerNorm norm1_, norm2_;
  Attention attention_;
  torch::nn::Linear up_, down_;
};
TORCH_MODULE(Block);

/// A language model over bytes: logits of the next byte for every byte of the input.
class ByteModelImpl : public torch::nn::Module {
 public:
  ByteModelImpl(int64_t channels, int64_t num_heads, int64_t num_blocks);

  /// int64 `[B, S]` to `[B, S, 256]`.
  torch::Tensor forward(const torch::Tensor& bytes);

 private:
  torch::nn::Embedding embedding_;
  torch::nn::ModuleList blocks_;
  torch::nn::LayerNorm norm_;
  torch::nn::Linear head_;
};
TORCH_MODULE(ByteModel);
