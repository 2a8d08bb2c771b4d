#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// ALiBi as models write it in tensor operations: what posenc is compared with.
namespace posenc::bench {

/// The bias `[H, S, S]` in the dtype of the scores, from float32 slopes `[H]`; differentiable with respect to them by
/// autograd.
using EagerBias = std::function<at::Tensor(const at::Tensor& slopes)>;

/// What a formulation makes its own constants from.
struct EagerAlibiOptions {
  int64_t sequence;
  at::Device device;
  /// Of the scores, and of the bias that is added to them.
  at::ScalarType dtype;
};

struct EagerAlibi {
  /// As in the names of benchmarks and in the tables.
  std::string name;
  EagerBias (*make)(const EagerAlibiOptions& options);
};

/// The usual formulations of the symmetric bias for scores of `dtype`. None keeps `[H, S, S]` from one call to the
/// next: a model that does pays with the memory, and cannot learn slopes.
std::vector<EagerAlibi> eager_alibi_biases(at::ScalarType dtype);

/// `softmax(scale * scores + bias + mask)` of `[B, H, S, S]` over the keys.
using EagerSoftmax = std::function<at::Tensor(const at::Tensor& scores, const at::Tensor& slopes, double scale)>;

struct EagerAlibiSoftmax {
  std::string name;
  EagerSoftmax (*make)(const EagerAlibiOptions& options);
};

/// The usual formulations of the softmax with a causal mask.
std::vector<EagerAlibiSoftmax> eager_alibi_softmaxes();

}  // namespace posenc::bench
