#pragma once

#include <arguments/context_parallel_alibi_attention.h>
#include <ops/alibi_attention.h>

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

// The operators of attention over a process group below the public function.
namespace posenc {

using arguments::ContextParallelOptions;

/// Which of the gradients of q, k, v and slopes are computed.
struct AttentionGradMask {
  std::array<bool, 4> wanted;

  auto flat() const { return std::tie(wanted); }
};

// Calls through the dispatcher.
namespace dispatch {

/// The output of `posenc::context_parallel_attention` for the rows of this rank and the log-sum-exp of their
/// logits over the keys of all ranks, `[B, Hq, S / C]`. Gradients flow through both.
std::tuple<at::Tensor, at::Tensor> context_parallel_alibi_attention(
    const ContextParallelOptions& options,
    const AttentionTensors& inputs);

/// The gradients of `context_parallel_alibi_attention`; those that `mask` does not name are undefined, as is that of
/// the slopes without slopes.
AttentionGradients context_parallel_alibi_attention_backward(
    const AttentionGradMask& mask,
    const AttentionBackwardArguments& arguments,
    const ContextParallelOptions& options);

}  // namespace dispatch
}  // namespace posenc
