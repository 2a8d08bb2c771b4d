#pragma once

#include <arguments/rotary_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/rotary_chunk.cuh>
#include <cuda/detail/rotary_stage.cuh>

// Rotates one or two tensors, and copies a third, in one launch; forward and backward are the same kernel. As a thread
// loads its whole chunk before it stores, outputs may be the inputs.
//
// A thread owns one chunk (rotary_chunk.cuh) of one head of one token, or of three with rotary_stage.cuh. Threads along
// x are the chunks of a head, along y the heads (all of q, then all of k, then all of v), along z tokens. Blocks go
// through the heads of a token first, and so through memory in its order (4 % for float32, measured on an H200).
namespace posenc::cuda {

/// What a launch knows beforehand. Each removes code, and registers with it, from the kernel.
template <
    int VectorWidth,
    bool IsInterleaved,
    bool IsSplat,
    bool HasCopies,
    bool HasAxes = false,
    bool DoesMixAxes = false>
struct RotaryPolicy {
  static constexpr int kVectorWidth = VectorWidth;
  static constexpr bool kInterleaved = IsInterleaved;
  static constexpr bool kSplat = IsSplat;          // one value for all channels of a head
  static constexpr bool kCopies = HasCopies;       // channels behind the rotary width, or a tensor that is only copied
  static constexpr bool kAxes = HasAxes;           // pairs choose among the axes of the positions
  static constexpr bool kMixesAxes = DoesMixAxes;  // and not all pairs of a vector choose the same
  static constexpr int kHeads = DoesMixAxes ? 3 : 1;  // of a thread
};

/// How blocks are laid over the tensors. `groups` counts those along whichever of heads and tokens comes first.
struct RotaryGrid {
  Divider groups;
  Divider seq_len;
  int32_t num_chunks;  // of one head
  bool tokens_first;
};

/// Blocks that an SM holds at least. The three heads that wait at the barrier of rotary_stage.cuh take 72 registers.
template <typename Policy>
constexpr int kMinBlocksOf = Policy::kMixesAxes ? 6 : kMinBlocks;

template <typename T, typename Policy>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocksOf<Policy>)
    rotary_embedding_kernel(const __grid_constant__ RotaryProblem problem, const __grid_constant__ RotaryGrid grid) {
  const uint32_t slow = grid.groups.quotient(blockIdx.x);
  const uint32_t fast = blockIdx.x - slow * grid.groups.divisor;
  const uint32_t token_group = grid.tokens_first ? fast : slow;
  const uint32_t head_group = grid.tokens_first ? slow : fast;
  const uint32_t token = token_group * blockDim.z + threadIdx.z;
  const uint32_t first_head = head_group * blockDim.y * Policy::kHeads + threadIdx.y;
  const auto q_heads = static_cast<uint32_t>(problem.operands[0].num_heads);
  const auto k_heads = static_cast<uint32_t>(problem.operands[1].num_heads);
  const auto v_heads = Policy::kCopies ? static_cast<uint32_t>(problem.operands[2].num_heads) : 0;
  const uint32_t batch = grid.seq_len.quotient(token);
  const uint32_t seq = token - batch * grid.seq_len.divisor;
  const bool has_token = batch < problem.batch;
  const int chunk = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const auto exists = [&](uint32_t head_of_all) {
    return has_token && head_of_all < q_heads + k_heads + v_heads && chunk < grid.num_chunks;
  };
  const auto place_of = [&](uint32_t head_of_all) -> Place<T> {
    const bool is_v = Policy::kCopies && head_of_all >= q_heads + k_heads;
    const bool is_k = !is_v && head_of_all >= q_heads;
    const uint32_t head = head_of_all - (is_v ? q_heads + k_heads : is_k ? q_heads : 0);
    const RotaryProblem::Operand& operand = problem.operands[is_v ? 2 : is_k ? 1 : 0];
    const Strides& from = operand.in_strides;
    const Strides& to = operand.out_strides;
    return {
        static_cast<const T*>(operand.in) + batch * from.batch + seq * from.seq + head * from.head,
        static_cast<T*>(operand.out) + batch * to.batch + seq * to.seq + head * to.head,
        from.channel,
        to.channel,
        batch,
        seq,
        is_v};
  };
  if constexpr (Policy::kMixesAxes) {
    Place<T> places[Policy::kHeads];
    bool exist[Policy::kHeads];
#pragma unroll
    for (int h = 0; h < Policy::kHeads; ++h) {
      places[h] = place_of(first_head + h * blockDim.y);
      exist[h] = exists(first_head + h * blockDim.y);
    }
    rotate_chunks_by_stage<Policy>(problem, places, exist, chunk, has_token);
  } else if (exists(first_head)) {
    rotate_chunk<Policy>(problem, place_of(first_head), chunk);
  }
}

}  // namespace posenc::cuda
