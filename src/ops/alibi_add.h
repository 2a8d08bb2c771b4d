#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>

namespace posenc {

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

}  // namespace posenc
