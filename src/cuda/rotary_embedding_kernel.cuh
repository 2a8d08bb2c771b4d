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
__global__ void __launch_bounds__(kMaxThreads)
    rotary_embedding_kernel(const __grid_constant__ RotaryProblem problem, int num_chunks) {
  using Chunk = RotaryChunk<T, V, Interleaved>;

  const uint32_t token = blockIdx.x * blockDim.z + threadIdx.z;
  const uint32_t head_of_all = blockIdx.y * blockDim.y + threadIdx.y;
  const auto q_heads = static_cast<uint32_t>(problem.operands[0].num_heads);
  const auto k_heads = static_cast<uint32_t>(problem.operands[1].num_heads);
  const auto seq_len = static_cast<uint32_t>(problem.seq_len);
  const uint32_t batch = token / seq_len;
  if (batch >= problem.batch || head_of_all >= q_heads + k_heads) {
    return;
  }
  const uint32_t seq = token - batch * seq_len;
  const bool is_k = head_of_all >= q_heads;
  const uint32_t head = is_k ? head_of_all - q_heads : head_of_all;
  const RotaryProblem::Operand& operand = problem.operands[is_k ? 1 : 0];
  const Strides& from = operand.in_strides;
  const Strides& to = operand.out_strides;
  const T* in = static_cast<const T*>(operand.in) + batch * from.batch + seq * from.seq + head * from.head;
  T* out = static_cast<T*>(operand.out) + batch * to.batch + seq * to.seq + head * to.head;
  const TableRow row = table_row(problem, batch, seq);

  // One round, unless a head has more chunks than a block has threads.
  for (int index = threadIdx.x; index < num_chunks; index += blockDim.x) {
    Chunk chunk(index, static_cast<int>(problem.num_pairs), static_cast<int>(problem.head_dim));
    chunk.load(in, from.channel);
    if (chunk.rotates) {
      chunk.rotate(problem, row);
    }
    if (!row.exists) {
      chunk.fill_nan();
    }
    chunk.store(out, to.channel);
  }
}

}  // namespace posenc::cuda
