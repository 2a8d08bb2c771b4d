#pragma once

#include <ops/rotary_embedding.h>

#include <ATen/ops/constant_pad_nd.h>

namespace posenc::autograd {

/// `x` rotated by gradients or tangents of tables, which are the tables of `rotation`. The tail, channels R to D - 1,
/// does not depend on the tables and is zero in the result.
inline at::Tensor rotate_by_table_gradients(const Rotation& rotation, const at::Tensor& x) {
  const c10::SymInt rotary_dim = rotation.cos.sym_size(-1) * 2;
  const c10::SymInt tail = x.sym_size(-1) - rotary_dim;
  const at::Tensor rotated = dispatch::rotary_embedding(rotation, x.narrow_symint(-1, 0, rotary_dim));
  return tail == 0 ? rotated : at::constant_pad_nd_symint(rotated, {0, tail});
}

}  // namespace posenc::autograd
