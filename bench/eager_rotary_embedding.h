#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// RoPE in LibTorch's tensor operations, as models write it. posenc is compared with these formulations.
namespace posenc::bench {

/// Rotates one tensor, `[B, S, H, D]` or `[B, H, S, D]`. Differentiable by autograd.
using EagerRotation = std::function<at::Tensor(const at::Tensor&)>;

/// From these a formulation makes its own tables.
struct EagerTables {
  /// float32 `[S, R/2]`.
  at::Tensor cos;
  at::Tensor sin;
  /// Dtype of the tensors to rotate. Models cast their tables to it.
  at::ScalarType dtype;
  /// Sequence dimension of the tensors to rotate: 1 or 2.
  int64_t sequence_dim;
};

struct EagerFormulation {
  /// The implementation's name in benchmarks and tables.
  std::string name;
  EagerRotation (*make)(const EagerTables& tables);
};

/// The usual formulations for one kind of pairing; see posenc/rotary_embedding.h for `interleaved`.
std::vector<EagerFormulation> eager_rotary_embeddings(bool interleaved);

}  // namespace posenc::bench
