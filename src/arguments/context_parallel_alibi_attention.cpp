#include <arguments/context_parallel_alibi_attention.h>
#include <arguments/tensor.h>

#include <limits>

namespace posenc::arguments {
namespace {

using at::Tensor;

ConcreteAttentionOptions options_of_one(const ContextParallelALiBiAttentionOptions& options) {
  ConcreteAttentionOptions result;
  result.scale = options.scale();
  result.causal = options.causal();
  return result;
}

void check_shard(const char* op, const Tensor& q) {
  check_defined(op, "q", q);
  TORCH_CHECK(q.dim() == 4, op, ": expected q of shape [B, S / C, Hq, D], got ", q.sizes());
  TORCH_CHECK(
      q.size(1) % 2 == 0, op, ": expected q of an even number of tokens, two chunks of the sequence, got ", q.sizes());
}

/// Of a call that is right but for the other ranks.
AlibiAttention checked(const char* op, const AlibiAttention& call, int64_t world_size) {
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
    const AttentionTensors& inputs,
    const ContextParallelALiBiAttentionOptions& options,
    int64_t world_size) {
  check_shard(op, inputs.q);
  return checked(op, check_attention(op, inputs, options_of_one(options)), world_size);
}

AlibiAttention check_context_parallel_attention_backward(
    const char* op,
    const AttentionBackwardArguments& arguments,
    const ContextParallelALiBiAttentionOptions& options,
    int64_t world_size) {
  check_shard(op, arguments.q);
  return checked(op, check_attention_backward(op, arguments, options_of_one(options)), world_size);
}

}  // namespace posenc::arguments
