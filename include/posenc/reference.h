#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

/// The operators of this library in plain LibTorch tensor operations: the statement of what each one computes,
/// differentiated by autograd itself. Tests hold the kernels against these; they are slow on purpose.
namespace posenc::reference {

/// `posenc::rotary_embedding` in tensor operations. `x` is widened to the dtype of the tables and the result
/// rounded once.
POSENC_API at::Tensor rotary_embedding(
    const at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false);

/// `posenc::rotary_embedding_qk` in tensor operations.
POSENC_API std::tuple<at::Tensor, at::Tensor> rotary_embedding_qk(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false);

}  // namespace posenc::reference
