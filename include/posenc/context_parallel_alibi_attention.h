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

/// Options for `context_parallel_alibi_attention`.
///
/// Example:
/// ```
/// posenc::ContextParallelALiBiAttentionOptions().causal(true)
/// ```
struct POSENC_API ContextParallelALiBiAttentionOptions {
  /// Factor of the products of queries and keys, not of the bias. Default: `1 / sqrt(D)`.
  TORCH_ARG(std::optional<double>, scale) = std::nullopt;
  /// Hide the keys beyond the position of the query. Default: false.
  TORCH_ARG(bool, causal) = false;
};

/// `posenc::alibi_attention` of sequences that are divided among the C ranks of a process group: what it gives for the
/// whole sequences, of which each rank holds the part of its own tokens. Distances are those of the whole sequence.
///
/// Rank r holds chunks r and 2 C - 1 - r of the 2 C chunks of equal length of every sequence, in this order, so that
/// all ranks have as much of a causal mask: the tokens of `posenc::context_parallel_positions`.
///
/// Keys and values travel around the ranks, a block at a time, while the block before is computed (ring attention, Liu
/// et al. 2023, https://arxiv.org/abs/2310.01889, section 3); outputs over parts of the keys are merged by their
/// log-sum-exp in float32 (float64 for float64). The backward pass goes around once more, and gradients of keys and
/// values travel with their block, in the dtype of sums. What a rank holds grows with S / C, in the backward pass too;
/// q, k, v, slopes, the output and its log-sum-exp are saved for it. Blocks are computed as `alibi_attention` computes
/// them: fused where half a shard meets its conditions.
///
/// All ranks call it, in the same order among the collectives of the group, with the same shapes, dtypes, options and
/// tensors that require a gradient, and run its backward pass likewise. That cannot be seen from one rank: where it
/// does not hold, ranks wait until the group's timeout. The host waits for nothing with NCCL; the collective is
/// `alltoall_base`, so Gloo serves as well. A group of one rank is `alibi_attention` itself. Results are the same bits
/// every time where those of `alibi_attention` are.
///
/// Gradients reach q, k, v and slopes, once: they cannot be differentiated again. That of the slopes, of which each
/// rank has a copy, is what the queries of this rank contribute, and the sum over the ranks is that of the whole
/// sequence: so it is with every parameter of a model whose tokens are divided, and what reduces the others (DDP, FSDP
/// or an all-reduce over the group) reduces this one.
///
/// @param q  `[B, S / C, Hq, D]`: float16, bfloat16, float32 or float64, any strides. S / C is even.
/// @param k,v  `[B, S / C, Hk, D]`, of the dtype and device of q; Hq is a multiple of Hk (GQA, MQA). With more than one
///   rank they are written into one buffer to be sent.
/// @param slopes  `[Hq]` of any stride: float32, or float64 with float64 q. The same on all ranks. Stays float32 under
///   autocast.
/// @param group  the ranks, in the order of the chunks; or the name that a group is registered by: in Python
///   `torch.distributed` registers all of them, by their `group_name`.
/// @return a tensor of the shape and dtype of q, in its memory layout where that is dense.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is sent; that LibTorch has
///   no c10d, where it was built without.
///
/// Example:
/// ```
/// at::Tensor tokens = posenc::context_parallel_positions(seq_len, group->getRank(), group->getSize(), device);
/// at::Tensor x = embeddings.index_select(1, tokens);  // and q, k, v made of it
/// at::Tensor out = posenc::context_parallel_alibi_attention(
///     q, k, v, slopes, group, posenc::ContextParallelALiBiAttentionOptions().causal(true));
/// ```
POSENC_API at::Tensor context_parallel_alibi_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ContextParallelALiBiAttentionOptions& options = {});
POSENC_API at::Tensor context_parallel_alibi_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const std::string& group_name,
    const ContextParallelALiBiAttentionOptions& options = {});

}  // namespace posenc
