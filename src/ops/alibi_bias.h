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

}  // namespace posenc
