#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

// ALiBi in LibTorch's tensor operations, as models write it. posenc is compared with these formulations.
namespace posenc::bench {

/// Computes the bias `[H, S, S]`, in the dtype of the scores, from float32 slopes `[H]`. Differentiable by autograd
/// with respect to the slopes.
using EagerBias = std::function<at::Tensor(const at::Tensor& slopes)>;

/// From these a formulation makes its constants, such as distances and mask.
struct EagerAlibiOptions {
  int64_t sequence;
  at::Device device;
  /// Dtype of the scores and of the bias.
  at::ScalarType dtype;
};

struct EagerAlibi {
  /// The implementation's name in benchmarks and tables.
  std::string name;
  EagerBias (*make)(const EagerAlibiOptions& options);
};

/// The usual formulations of the symmetric bias for scores of `dtype`. None keeps the bias `[H, S, S]` between calls:
/// that costs memory and excludes learnable slopes.
std::vector<EagerAlibi> eager_alibi_biases(at::ScalarType dtype);

/// LibTorch's `scaled_dot_product_attention` of q, k, v `[B, S, H, D]`, with the result in their layout.
/// @param bias  broadcasts with `[B, H, Sq, Sk]`; nullopt: none.
at::Tensor library_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& bias,
    bool causal);

/// `softmax(scale * scores + bias + mask)` over the keys (last dimension) of scores `[B, H, S, S]`.
using EagerSoftmax = std::function<at::Tensor(const at::Tensor& scores, const at::Tensor& slopes, double scale)>;

struct EagerAlibiSoftmax {
  std::string name;
  EagerSoftmax (*make)(const EagerAlibiOptions& options);
};

/// The usual formulations of the softmax with a causal mask.
std::vector<EagerAlibiSoftmax> eager_alibi_softmaxes();

}  // namespace posenc::bench
