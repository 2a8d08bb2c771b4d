#pragma once

#include <arguments/alibi.h>
#include <ops/dispatch.h>

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

inline at::Tensor alibi_bias(const AlibiBiasArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_bias>("posenc::alibi_bias", arguments);
}

inline at::Tensor alibi_add(const AlibiAddArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_add>("posenc::alibi_add", arguments);
}

/// Overwrites `scores`. It returns nothing: torch.compile accepts no operator that returns its argument.
inline void alibi_add_(const AlibiAddArguments<c10::SymInt>& arguments) {
  call_operator<&alibi_add_>("posenc::alibi_add_", arguments);
}

/// `grad`, zero where the causal mask of `alibi_add` hides the key: the gradient of the scores. Shape and
/// `query_offset` are those of `alibi_add`.
inline at::Tensor alibi_mask(const AlibiMaskArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_mask>("posenc::alibi_mask", arguments);
}

/// The gradient of `alibi_bias` and `alibi_add` with respect to slopes:
///
///     dslopes[h] = -sum over b, i, j of grad[b, h, i, j] * |query_offset + i - j|,
///
/// with `causal` over the keys that the query sees. Deterministic.
///
/// @param arguments  `grad` is the gradient of the bias or the sum: `[B, H, Sq, Sk]` or `[H, Sq, Sk]`, any strides.
/// @return `[H]`: float64 for float64, float32 for all others.
inline at::Tensor alibi_slopes_backward(const AlibiSlopesBackwardArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_slopes_backward>("posenc::alibi_slopes_backward", arguments);
}

}  // namespace dispatch
}  // namespace posenc
