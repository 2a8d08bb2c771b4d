#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace posenc {

/// All gradients of `rotary_embedding` and `rotary_embedding_qk` in one pass over memory: what the rotation backwards
/// gives for `grads`, and what `rotary_embedding_tables_backward` gives for `grads` and `inputs`.
///
/// @param grads,inputs  gradients of the outputs and the inputs of the rotation: one pair, or two (q and k).
/// @return `(input_grads, dcos, dsin)`.
///
/// Where something requires grad it is made of those two operators, which can be differentiated.
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> rotary_embedding_backward(
    at::TensorList grads,
    at::TensorList inputs,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes);

/// The same by those two operators: wherever one kernel for both has nothing to offer.
std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> rotary_embedding_backward_in_two(
    at::TensorList grads,
    at::TensorList inputs,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes);

}  // namespace posenc
