#pragma once

#include <autograd/detail/node.h>
#include <ops/rotary_embedding.h>

#include <torch/csrc/autograd/saved_variable.h>

#include <optional>
#include <tuple>
#include <vector>

namespace posenc::autograd {

/// A `Rotation` that owns its tensors.
struct UnpackedRotation {
  at::Tensor cos, sin;
  std::optional<at::Tensor> positions;
  bool interleaved, conjugate;
  at::IntArrayRef pair_axes;  // refers to the SavedRotation

  // NOLINTNEXTLINE(google-explicit-constructor): the Rotation refers to this object
  operator Rotation() const { return {cos, sin, positions, interleaved, conjugate, pair_axes}; }
};

/// A `Rotation` with its tensors as saved variables.
struct SavedRotation {
  SavedRotation() = default;
  explicit SavedRotation(const Rotation& rotation)
      : cos(rotation.cos, /*is_output=*/false),
        sin(rotation.sin, /*is_output=*/false),
        positions(rotation.positions, /*is_output=*/false),
        interleaved(rotation.interleaved),
        conjugate(rotation.conjugate),
        pair_axes(rotation.pair_axes.vec()) {}

  auto state() { return std::tie(cos, sin, positions, interleaved, conjugate, pair_axes); }

  UnpackedRotation unpack() const {
    return {cos.unpack(), sin.unpack(), optional_tensor(positions.unpack()), interleaved, conjugate, pair_axes};
  }

  torch::autograd::SavedVariable cos, sin, positions;
  bool interleaved = false;
  bool conjugate = false;
  std::vector<int64_t> pair_axes;
};

/// Whether the tables require a gradient, for which the inputs must be saved.
inline bool tables_require_grad(const Rotation& rotation) {
  return rotation.cos.requires_grad() || rotation.sin.requires_grad();
}

}  // namespace posenc::autograd
