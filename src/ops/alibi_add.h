#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace posenc {

/// `grad`, zero where the causal mask of `alibi_add` hides the key: what is left of a gradient of scores. Shape and
/// `query_offset` are those of `alibi_add`.
at::Tensor alibi_mask(const at::Tensor& grad, std::optional<int64_t> query_offset);

}  // namespace posenc
