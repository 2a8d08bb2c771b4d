#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

// Rotary embedding as models write it in tensor operations: what posenc is compared with.
namespace posenc::bench {

/// Rotates one tensor, `[B, S, H, D]` or `[B, H, S, D]`; differentiable by autograd.
using EagerRotation = std::function<at::Tensor(const at::Tensor&)>;

/// What a formulation makes its own tables from.
struct EagerTables {
  /// float32 `[S, R/2]`.
  at::Tensor cos;
  at::Tensor sin;
  /// Of the tensors to rotate; models cast their tables to it.
  at::ScalarType dtype;
  /// Dimension of the tensors that is the sequence: 1 or 2.
  int64_t sequence_dim;
};

struct EagerFormulation {
  /// As in the names of benchmarks and in the tables.
  std::string name;
  EagerRotation (*make)(const EagerTables& tables);
};

/// The usual formulations for one kind of pairing; see posenc/rotary_embedding.h for `interleaved`.
std::vector<EagerFormulation> eager_rotary_embeddings(bool interleaved);

}  // namespace posenc::bench
