#pragma once

#include <contract/rotary_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/rotary_chunk.cuh>

// Rotates one or two tensors in one launch; forward and backward are the same kernel.
//
// A thread owns one chunk (rotary_chunk.cuh) of one head of one token. Threads along x are the chunks of a head,
// along y the heads (all of q, then all of k), along z tokens. The grid has tokens along x, where it may be
// largest, and groups of heads along y.
namespace posenc::cuda {

template <typename T, int V, bool Interleaved>
__global__ void __launch_bounds__(kMaxThreads) rotary_embedding_kernel(
    const __grid_constant__ RotaryProblem problem,
    const __grid_constant__ Divider seq_len,
    int num_chunks) {
  const uint32_t token = blockIdx.x * blockDim.z + threadIdx.z;
  const uint32_t head_of_all = blockIdx.y * blockDim.y + threadIdx.y;
  const auto q_heads = static_cast<uint32_t>(problem.operands[0].num_heads);
  const auto k_heads = static_cast<uint32_t>(problem.operands[1].num_heads);
  const uint32_t batch = seq_len.quotient(token);
  if (batch >= problem.batch || head_of_all >= q_heads + k_heads) {
    return;
  }
  const uint32_t seq = token - batch * seq_len.divisor;
  const bool is_k = head_of_all >= q_heads;
  const uint32_t head = is_k ? head_of_all - q_heads : head_of_all;
  const RotaryProblem::Operand& operand = problem.operands[is_k ? 1 : 0];
  const Strides& from = operand.in_strides;
  const Strides& to = operand.out_strides;
  const T* in = static_cast<const T*>(operand.in) + batch * from.batch + seq * from.seq + head * from.head;
  T* out = static_cast<T*>(operand.out) + batch * to.batch + seq * to.seq + head * to.head;
  const int rotary_chunks = static_cast<int>(problem.num_pairs) / V;
  const Place<T> place{in, out, from.channel, to.channel, batch, seq};

  // One round, unless a head has more chunks than a block has threads.
  for (int chunk = threadIdx.x; chunk < num_chunks; chunk += blockDim.x) {
    if (chunk >= rotary_chunks) {
      copy_chunk<V>(problem, place, chunk - rotary_chunks);
    } else if (V > 1 && from.channel == 0) {
      rotate_chunk<V, Interleaved, true>(problem, place, chunk);
    } else {
      rotate_chunk<V, Interleaved, false>(problem, place, chunk);
    }
  }
}

}  // namespace posenc::cuda
