#include "model.h"

#include <torch/nn/functional/activation.h>

namespace nn = torch::nn;

AttentionImpl::AttentionImpl(int64_t channels, int64_t num_heads)
    : num_heads_(num_heads),
      qkv_(register_module("qkv", nn::Linear(channels, 3 * channels))),
      out_(register_module("out", nn::Linear(channels, channels))),
      rope_(register_module(
          "rope",
          posenc::RotaryEmbedding(posenc::RotaryEmbeddingOptions(channels / num_heads).layout(posenc::Layout::bhsd)))) {
}

torch::Tensor AttentionImpl::forward(const torch::Tensor& x) {
  const auto batch = x.size(0), seq_len = x.size(1), channels = x.size(2);
  // [3, B, H, S, D]: three views of the projection. The rotation reads any strides without a copy.
  const auto qkv = qkv_->forward(x).view({batch, seq_len, 3, num_heads_, -1}).permute({2, 0, 3, 1, 4});
  const auto [q, k] = rope_->forward(qkv[0], qkv[1]);
  const auto y =
      at::scaled_dot_product_attention(q, k, qkv[2], /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true);
  return out_->forward(y.transpose(1, 2).reshape({batch, seq_len, channels}));
}

BlockImpl::BlockImpl(int64_t channels, int64_t num_heads)
    : norm1_(register_module("norm1", nn::LayerNorm(nn::LayerNormOptions({channels})))),
      norm2_(register_module("norm2", nn::LayerNorm(nn::LayerNormOptions({channels})))),
      attention_(register_module("attention", Attention(channels, num_heads))),
      up_(register_module("up", nn::Linear(channels, 4 * channels))),
      down_(register_module("down", nn::Linear(4 * channels, channels))) {
}

torch::Tensor BlockImpl::forward(const torch::Tensor& x) {
  const auto y = x + attention_->forward(norm1_->forward(x));
  return y + down_->forward(nn::functional::gelu(up_->forward(norm2_->forward(y))));
}

ByteModelImpl::ByteModelImpl(int64_t channels, int64_t num_heads, int64_t num_blocks)
    : embedding_(register_module("embedding", nn::Embedding(256, channels))),
      blocks_(register_module("blocks", nn::ModuleList())),
      norm_(register_module("norm", nn::LayerNorm(nn::LayerNormOptions({channels})))),
      head_(register_module("head", nn::Linear(channels, 256))) {
  for (int64_t i = 0; i < num_blocks; ++i) {
    blocks_->push_back(Block(channels, num_heads));
  }
}

torch::Tensor ByteModelImpl::forward(const torch::Tensor& bytes) {
  auto x = embedding_->forward(bytes);
  for (const auto& block : *blocks_) {
    x = block->as<BlockImpl>()->forward(x);
  }
  return head_->forward(norm_->forward(x));
}
