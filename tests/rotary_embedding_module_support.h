#pragma once

#include "support.h"

#include <posenc/modules/rotary_embedding.h>

/// Shared by the tests of the module RotaryEmbedding.
namespace posenc::test {

/// Expects `actual` to be `x` rotated by `positions`, within the rounding of the operator and of cos and sin. Their
/// entries may be rounded differently from the standard library, and have the rounding error of angles up to `length`.
void expect_rotated(
    const at::Tensor& actual,
    const at::Tensor& x,
    const RotaryEmbeddingOptions& options,
    const std::optional<at::Tensor>& positions,
    int64_t length);

}  // namespace posenc::test
