#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/arg.h>

#include <optional>
#include <string>

namespace c10d {
class ProcessGroup;
}  // namespace c10d

namespace posenc {

/// Options for `context_parallel_attention`.
///
/// Example:
/// ```
/// posenc::ContextParallelAttentionOptions().causal(true)
/// ```
struct POSENC_API ContextParallelAttentionOptions {
  /// Slopes of linear biases (ALiBi, `posenc/alibi.h`), `[Hq]` or `[B, Hq]` of any strides: float32, or float64 with
  /// float64 q. The same on all ranks. They stay float32 under autocast. Default: no bias.
  TORCH_ARG(std::optional<at::Tensor>, slopes) = std::nullopt;
  /// Factor of the products of queries and keys, not of the bias. Default: `1 / sqrt(D)`.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  /// Hide the keys beyond the position of the query. Default: false.
  TORCH_ARG(bool, causal) = false;
};

/// `posenc::attention` over sequences that are divided among the C ranks of a process group. Each rank passes its
/// own tokens and gets the output for them. Distances and causal mask are those of the whole sequence. There are no
/// sliding windows.
///
/// Each sequence is divided into 2 C chunks of equal length. Rank r holds the tokens of chunks r and 2 C - 1 - r, in
/// this order. With a causal mask all ranks then compute the same number of scores.
/// `posenc::context_parallel_positions` returns the positions of the tokens of a rank.
///
/// Keys and values are passed around the ranks in blocks, and the transfer of a block overlaps with the computation on
/// the block before (ring attention, Liu et al. 2023, https://arxiv.org/abs/2310.01889, section 3). Outputs over parts
/// of the keys are merged by their log-sum-exp in float32 (float64 for float64). The backward pass passes keys and
/// values around once more, together with their gradients in the dtype of sums. The forward pass saves q, k, v and
/// slopes of the rank, its output and the log-sum-exp of its rows for the backward pass. The memory of a rank therefore
/// grows with S / C in both passes. The chunks of a rank are computed by `attention`, on the path that
/// docs/attention.md names for tensors of S / (2 C) tokens.
///
/// All ranks must call it in the same order among the collectives of the group, with the same shapes, dtypes, options
/// and tensors that require grad, and run its backward pass likewise. A rank cannot check this: if it does not hold,
/// ranks wait until the timeout of the group. With NCCL the host does not wait. The only collective is `alltoall_base`,
/// which Gloo has as well. A group of one rank calls `attention`. Results are deterministic if those of
/// `attention` are.
///
/// q, k, v and slopes have first derivatives only. The gradient of the slopes, of which each rank has a copy, is the
/// contribution of the queries of this rank; the sum over the ranks is the gradient for the whole sequence. This is the
/// same for every parameter of a model whose tokens are divided: DDP, FSDP or an all-reduce over the group sums it.
///
/// @param q  `[B, S / C, Hq, D]`: float16, bfloat16, float32 or float64, any strides. S / C is even.
/// @param k,v  `[B, S / C, Hk, D]`, of the dtype and device of q; Hq is a multiple of Hk (GQA, MQA). With more than
///   one rank they are copied into one buffer that is sent.
/// @param group  the ranks, in the order of the chunks. It is passed on by its registered name, as LibTorch's
///   functional collectives do; a group that is not registered is registered by a name of posenc. The autograd graph
///   keeps it alive.
/// @param group_name  the name that the group is registered by; `torch.distributed` registers all groups by their
///   `group_name`.
/// @return a tensor of the shape and dtype of q, in its memory layout if that is dense.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is sent; also if LibTorch
///   was built without c10d.
///
/// Example:
/// ```
/// at::Tensor tokens = posenc::context_parallel_positions(seq_len, group->getRank(), group->getSize(), device);
/// at::Tensor x = embeddings.index_select(1, tokens);  // and q, k, v made of it
/// at::Tensor out = posenc::context_parallel_attention(
///     q, k, v, group, posenc::ContextParallelAttentionOptions().causal(true));
/// ```
POSENC_API at::Tensor context_parallel_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ContextParallelAttentionOptions& options = {});
POSENC_API at::Tensor context_parallel_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::string& group_name,
    const ContextParallelAttentionOptions& options = {});

}  // namespace posenc
