#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace posenc {

/// The gradients of `alibi_softmax` from its result `probs`: with r the sum of `grad * probs` over the keys,
///
///     dscores = scale * probs * (grad - r),
///     dslopes[h] = -sum over b, i, j of probs * (grad - r) * |query_offset + i - j|.
///
/// Deterministic. Padding needs no mask: hidden keys have probability zero.
///
/// @return `(dscores, dslopes)`; the second is `[H]`, float64 for float64, float32 for all others, and undefined
///   unless `slopes_grad`.
std::tuple<at::Tensor, at::Tensor> alibi_softmax_backward(
    const at::Tensor& grad,
    const at::Tensor& probs,
    double scale,
    bool causal,
    std::optional<int64_t> query_offset,
    bool slopes_grad);

}  // namespace posenc
