#pragma once

#include <ops/dispatch.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

// The rotary operators below the public functions.
namespace posenc {

/// The arguments that every operator of this family has beside its inputs, as `posenc/rotary_embedding.h` documents
/// them. It refers to the tensors of the call.
struct Rotation {
  const at::Tensor& cos;
  const at::Tensor& sin;
  const std::optional<at::Tensor>& positions;
  bool interleaved;
  bool conjugate;
  at::IntArrayRef pair_axes;

  /// The rotation by the negative angles, which is also the gradient of this one.
  Rotation inverse() const { return {cos, sin, positions, interleaved, !conjugate, pair_axes}; }

  auto flat() const { return std::tie(cos, sin, positions, interleaved, conjugate, pair_axes); }
};

/// The arguments of `rotary_embedding_pack` beside its inputs.
struct PackRotation {
  const at::Tensor& cos;
  const at::Tensor& sin;
  const std::optional<at::Tensor>& positions;
  bool stacked;
  bool interleaved;
  bool conjugate;
  at::IntArrayRef pair_axes;

  Rotation rotation() const { return {cos, sin, positions, interleaved, conjugate, pair_axes}; }

  auto flat() const { return std::tie(cos, sin, positions, stacked, interleaved, conjugate, pair_axes); }
};

// Calls through the dispatcher. `posenc/rotary_embedding.h` documents those that users call too.
namespace dispatch {

inline at::Tensor rotary_embedding(const Rotation& rotation, const at::Tensor& x) {
  return call_operator<&rotary_embedding>("posenc::rotary_embedding", rotation, x);
}
inline std::tuple<at::Tensor, at::Tensor> rotary_embedding_qk(
    const Rotation& rotation,
    const at::Tensor& q,
    const at::Tensor& k) {
  return call_operator<&rotary_embedding_qk>("posenc::rotary_embedding_qk", rotation, q, k);
}

/// The in-place operators return nothing: functionalisation (torch.compile) accepts no operator that returns its
/// argument.
inline void rotary_embedding_(const Rotation& rotation, at::Tensor& x) {
  call_operator<&rotary_embedding_>("posenc::rotary_embedding_", rotation, x);
}
inline void rotary_embedding_qk_(const Rotation& rotation, at::Tensor& q, at::Tensor& k) {
  call_operator<&rotary_embedding_qk_>("posenc::rotary_embedding_qk_", rotation, q, k);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> rotary_embedding_qkv(
    const Rotation& rotation,
    const at::Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads) {
  return call_operator<&rotary_embedding_qkv>("posenc::rotary_embedding_qkv", rotation, qkv, num_q_heads, num_kv_heads);
}
inline at::Tensor rotary_embedding_pack(
    const PackRotation& rotation,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v) {
  return call_operator<&rotary_embedding_pack>("posenc::rotary_embedding_pack", rotation, q, k, v);
}

/// All gradients of `rotary_embedding` and `rotary_embedding_qk` in one pass over memory: `grads` rotated by
/// `rotation.inverse()`, and the results of `rotary_embedding_tables_backward`. If an argument requires grad, it calls
/// these two operators, which are differentiable.
///
/// @param grads  gradients of the rotated outputs, each of the shape of its input: one tensor, or those of q and k.
/// @param inputs  the tensors that were rotated, `[B, S, H, D]` or `[T, H, D]`: as many as `grads`.
/// @return `(input_grads, dcos, dsin)`, of the shapes of `grads`, `cos` and `sin`.
inline std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> rotary_embedding_backward(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  return call_operator<&rotary_embedding_backward>("posenc::rotary_embedding_backward", rotation, grads, inputs);
}

/// The gradients of `rotary_embedding` and `rotary_embedding_qk` with respect to `cos` and `sin`:
///
///     dcos = sum(g1 x1 + g2 x2),    dsin = sum(g2 x1 - g1 x2)    (negated where conjugate)
///
/// where (x1, x2) is a pair of channels of an input and (g1, g2) the same pair of the gradient of its output. The sum
/// is over all heads of all inputs and over the tokens that read the row of the tables. Deterministic. Of `cos` and
/// `sin` only shape and dtype are read.
///
/// @param grads,inputs  as for `rotary_embedding_backward`.
/// @return `(dcos, dsin)`, of the shape and dtype of `cos`, contiguous.
inline std::tuple<at::Tensor, at::Tensor> rotary_embedding_tables_backward(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  return call_operator<&rotary_embedding_tables_backward>(
      "posenc::rotary_embedding_tables_backward", rotation, grads, inputs);
}

}  // namespace dispatch

/// `rotary_embedding_backward` by the two operators that it combines. Used where a single kernel has no advantage, and
/// for second derivatives.
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> rotary_embedding_backward_by_parts(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs);

}  // namespace posenc
