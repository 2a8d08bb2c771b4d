#pragma once

#include <arguments/alibi.h>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

// The operators of the ALiBi bias below the public functions.
namespace posenc {

using arguments::AlibiAddArguments;
using arguments::AlibiBiasArguments;
using arguments::AlibiMaskArguments;
using arguments::AlibiSlopesBackwardArguments;

// Calls through the dispatcher. `posenc/alibi.h` documents those that users call too.
namespace dispatch {

at::Tensor alibi_bias(const AlibiBiasArguments<c10::SymInt>& arguments);
at::Tensor alibi_add(const AlibiAddArguments<c10::SymInt>& arguments);

/// Overwrites `scores`. It returns nothing: torch.compile accepts no operator that returns its argument.
void alibi_add_(const AlibiAddArguments<c10::SymInt>& arguments);

/// `grad`, zero where the causal mask of `alibi_add` hides the key: the gradient of the scores. Shape and
/// `query_offset` are those of `alibi_add`.
at::Tensor alibi_mask(const AlibiMaskArguments<c10::SymInt>& arguments);

/// The gradient of `alibi_bias` and `alibi_add` with respect to slopes:
///
///     dslopes[h] = -sum over b, i, j of grad[b, h, i, j] * |query_offset + i - j|,
///
/// with `causal` over the keys that the query sees. Deterministic.
///
/// @param arguments  `grad` is the gradient of the bias or the sum: `[B, H, Sq, Sk]` or `[H, Sq, Sk]`, any strides.
/// @return `[H]`: float64 for float64, float32 for all others.
at::Tensor alibi_slopes_backward(const AlibiSlopesBackwardArguments<c10::SymInt>& arguments);

}  // namespace dispatch
}  // namespace posenc
