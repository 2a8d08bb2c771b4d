#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <tuple>

namespace posenc {

/// `alibi_softmax` with an offset that may still be a symbol, as under torch.compile.
at::Tensor alibi_softmax_symint(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<at::Tensor>& key_padding_mask,
    std::optional<c10::SymInt> query_offset);

/// The gradients of `alibi_softmax` from its result `probs`. With `slopes_grad`, P are `probs` divided by their sum
/// over the keys, otherwise `probs` themselves. With r the sum of `grad * P` over the keys,
///
///     dscores = scale * P * (grad - r),
///     dslopes[h] = -sum over b, i, j of P * (grad - r) * |query_offset + i - j|.
///
/// The division takes out what the rounding of `probs` to half or bfloat16 does to their sum. What it does to each of
/// them remains: an error of dslopes of about 0.2 % (bfloat16) or 0.03 % (half) of the root of the sum of the squared
/// terms. Deterministic. Padding needs no mask: hidden keys have probability zero.
///
/// @return `(dscores, dslopes)`; the second is `[H]`, float64 for float64, float32 for all others, and undefined
///   unless `slopes_grad`.
std::tuple<at::Tensor, at::Tensor> alibi_softmax_backward(
    const at::Tensor& grad,
    const at::Tensor& probs,
    double scale,
    bool causal,
    std::optional<c10::SymInt> query_offset,
    bool slopes_grad);

}  // namespace posenc
