#pragma once

#include <posenc/rotary_embedding.h>

#include <ATen/ops/constant_pad_nd.h>

namespace posenc::autograd {

/// Rotation of `x` by gradients or tangents of the tables. As the tables do not reach channels R to D - 1, these
/// are zero here, where a rotation would pass them through.
inline at::Tensor rotate_by_table_gradients(
    const at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const c10::SymInt rotary_dim = cos.sym_size(-1) * 2;
  const c10::SymInt tail = x.sym_size(-1) - rotary_dim;
  const at::Tensor rotated =
      rotary_embedding(x.narrow_symint(-1, 0, rotary_dim), cos, sin, positions, interleaved, conjugate, pair_axes);
  return tail == 0 ? rotated : at::constant_pad_nd_symint(rotated, {0, tail});
}

}  // namespace posenc::autograd
