#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace posenc {

/// The gradients of `rotary_embedding` and `rotary_embedding_qk` with respect to `cos` and `sin`:
///
///     dcos = sum(g1 x1 + g2 x2),    dsin = sum(g2 x1 - g1 x2)    (negated where conjugate)
///
/// over all heads of all inputs and every token that read the row. Deterministic.
///
/// @param grads,inputs  gradients of the outputs and the inputs of the rotation: one pair, or two (q and k).
/// @param table  `cos` or `sin`, for its shape and dtype.
/// @return `(dcos, dsin)`, contiguous.
std::tuple<at::Tensor, at::Tensor> rotary_embedding_tables_backward(
    at::TensorList grads,
    at::TensorList inputs,
    const at::Tensor& table,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes);

}  // namespace posenc
