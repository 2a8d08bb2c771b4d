#include <arguments/context_parallel_alibi_attention.h>
#include <arguments/tensor.h>

#include <limits>

namespace posenc::arguments {
namespace {

using at::Tensor;

/// Runs `check` on the tensors of this rank, and checks that they are a shard of a sequence among `world_size` ranks.
template <typename Check, typename Arguments>
AlibiAttention check_rank(
    const Check& check,
    const char* op,
    const Arguments& arguments,
    const ContextParallelOptions& options,
    int64_t world_size) {
  const Tensor& q = arguments.q;
  check_defined(op, "q", q);
  TORCH_CHECK(q.dim() == 4, op, ": expected q of shape [B, S / C, Hq, D], got ", q.sizes());
  TORCH_CHECK(
      q.size(1) % 2 == 0, op, ": expected q of an even number of tokens, two chunks of the sequence, got ", q.sizes());
  ConcreteAttentionOptions of_rank;
  of_rank.scale = options.scale;
  of_rank.causal = options.causal;
  const AlibiAttention call = check(op, arguments, of_rank);
  TORCH_CHECK(
      call.k_len == call.q_len, op, ": expected k and v of as many tokens as q, ", call.q_len, ", got ", call.k_len);
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(
      call.q_len <= kMax / world_size, op, ": expected at most ", kMax, " tokens of all ranks, got ", call.q_len,
      " on each of ", world_size);
  return call;
}

}  // namespace

AlibiAttention check_context_parallel_attention(
    const char* op,
    const AttentionTensors& arguments,
    const ContextParallelOptions& options,
    int64_t world_size) {
  return check_rank(check_attention, op, arguments, options, world_size);
}

AlibiAttention check_context_parallel_attention_backward(
    const char* op,
    const AttentionBackwardArguments& arguments,
    const ContextParallelOptions& options,
    int64_t world_size) {
  return check_rank(check_attention_backward, op, arguments, options, world_size);
}

}  // namespace posenc::arguments
