#pragma once

#include <arguments/alibi.h>

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
at::Tensor alibi_softmax(const AlibiSoftmaxArguments<c10::SymInt>& arguments);

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
std::tuple<at::Tensor, at::Tensor> alibi_softmax_backward(const AlibiSoftmaxBackwardArguments<c10::SymInt>& arguments);

}  // namespace dispatch
}  // namespace posenc
