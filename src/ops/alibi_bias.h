#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

namespace posenc {

/// `alibi_bias` with lengths and an offset that may still be symbols, as under torch.compile with dynamic shapes.
at::Tensor alibi_bias_symint(
    const at::Tensor& slopes,
    c10::SymInt q_len,
    c10::SymInt k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<c10::SymInt> query_offset);

/// `alibi_add` and `alibi_add_` with an offset that may still be a symbol, as under torch.compile.
at::Tensor alibi_add_symint(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    bool causal,
    std::optional<c10::SymInt> query_offset);
void alibi_add_symint_(
    at::Tensor& scores,
    const at::Tensor& slopes,
    bool causal,
    std::optional<c10::SymInt> query_offset);

/// `grad`, zero where the causal mask of `alibi_add` hides the key: what is left of a gradient of scores. Shape and
/// `query_offset` are those of `alibi_add`.
at::Tensor alibi_mask(const at::Tensor& grad, std::optional<c10::SymInt> query_offset);

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
