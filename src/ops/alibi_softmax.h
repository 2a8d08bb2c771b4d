#pragma once

#include <arguments/alibi.h>
#include <ops/dispatch.h>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <tuple>

// `alibi_softmax` and its backward below the public function.
namespace posenc {

using arguments::AlibiSoftmaxArguments;
using arguments::AlibiSoftmaxBackwardArguments;

// Calls through the dispatcher.
namespace dispatch {

/// `posenc::alibi_softmax`.
inline at::Tensor alibi_softmax(const AlibiSoftmaxArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_softmax>("posenc::alibi_softmax", arguments);
}

/// The gradients of `alibi_softmax` from its result `probs`. With `slopes_grad`, P are `probs` divided by their sum
/// over the keys, otherwise `probs` themselves. With r the sum of `grad * P` over the keys,
///
///     dscores = scale * P * (grad - r),
///     dslopes[h] = -sum over b, i, j of P * (grad - r) * |query_offset + i - j|.
///
/// In 16 bits `probs` are rounded. The division removes the error of their sum. The errors of the single probabilities
/// remain, and cause an error of dslopes of about 0.2 % (bfloat16) or 0.03 % (float16) of the root of the sum of its
/// squared terms. Deterministic. No key padding mask is needed: hidden keys have probability zero.
///
/// @return `(dscores, dslopes)`; the second is `[H]`, float64 for float64, float32 for all others, and undefined
///   unless `slopes_grad`.
inline std::tuple<at::Tensor, at::Tensor> alibi_softmax_backward(
    const AlibiSoftmaxBackwardArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_softmax_backward>("posenc::alibi_softmax_backward", arguments);
}

}  // namespace dispatch
}  // namespace posenc
