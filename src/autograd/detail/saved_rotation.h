#pragma once

#include <ops/rotary_embedding.h>

#include <torch/csrc/autograd/saved_variable.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace posenc::autograd {

/// A `Rotation` that owns its tensors.
struct UnpackedRotation {
  at::Tensor cos, sin;
  std::optional<at::Tensor> positions;
  bool interleaved, conjugate;
  at::IntArrayRef pair_axes;  // of the SavedRotation

  // NOLINTNEXTLINE(google-explicit-constructor): it is a Rotation as long as it lives
  operator Rotation() const { return {cos, sin, positions, interleaved, conjugate, pair_axes}; }
};

/// A `Rotation` as a node of the graph saves it.
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

  /// @param unpack  of a saved variable, `Node::unpack`.
  template <typename Unpack>
  UnpackedRotation unpacked(const Unpack& unpack) const {
    at::Tensor at_positions = unpack(positions);
    return {unpack(cos),
            unpack(sin),
            at_positions.defined() ? std::optional<at::Tensor>(std::move(at_positions)) : std::nullopt,
            interleaved,
            conjugate,
            pair_axes};
  }

  torch::autograd::SavedVariable cos, sin, positions;
  bool interleaved = false;
  bool conjugate = false;
  std::vector<int64_t> pair_axes;
};

/// Whether the tables are differentiable, so that the inputs must be saved.
inline bool tables_require_grad(const Rotation& rotation) {
  return rotation.cos.requires_grad() || rotation.sin.requires_grad();
}

}  // namespace posenc::autograd
