#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

namespace posenc {

/// The gradient of `alibi_bias` and `alibi_add` with respect to slopes:
///
///     dslopes[h] = -sum over b, i, j of grad[b, h, i, j] * |query_offset + i - j|,
///
/// with `causal` over the keys that the query sees. Deterministic.
///
/// @param grad  of the bias or the sum: `[B, H, Sq, Sk]` or `[H, Sq, Sk]`, any strides.
/// @return `[H]`: float64 for float64, float32 for all others.
at::Tensor alibi_slopes_backward(const at::Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset);

}  // namespace posenc
