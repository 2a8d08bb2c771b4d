#pragma once

#include <arguments/rotary_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/rotary_chunk.cuh>

// Rotates one or two tensors, and copies a third, in one launch. Forward and backward are the same kernel. A thread
// loads its whole chunk before it stores, so outputs may be the inputs.
//
// A thread processes one chunk (rotary_chunk.cuh) of one head of one token, or of three heads where the pairs of a
// vector mix axes. Threads along x are the chunks of a head, along y the heads (all of q, then all of k, then all of
// v), along z tokens. Consecutive blocks process the heads of a token first, which is the order of memory (4 % for
// float32, measured on an H200).
namespace posenc::cuda {

/// Constants of a launch. Each removes code, and with it registers, from the kernel.
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
  static constexpr bool kSplat = IsSplat;             // one value for all channels of a head
  static constexpr bool kCopies = HasCopies;          // heads may have a tail, or there is a tensor that is only copied
  static constexpr bool kTail = HasCopies;            // of rotary_chunk.cuh
  static constexpr bool kAxes = HasAxes;              // pairs choose among the axes of the positions
  static constexpr bool kMixesAxes = DoesMixAxes;     // the pairs of some vector choose different axes
  static constexpr int kHeads = DoesMixAxes ? 3 : 1;  // heads of a thread
};

/// How blocks are laid over the tensors.
struct RotaryGrid {
  Divider groups;  // groups of the faster index: of tokens if `tokens_first`, else of heads
  Divider seq_len;
  int32_t num_chunks;  // of one head
  bool tokens_first;
};

/// One head of one token.
template <typename T>
struct Place {
  const T* in;
  T* out;
  int64_t in_stride, out_stride;  // of channels
  int64_t batch, seq;
  bool copied;  // not rotated
};

/// Rotates one chunk, or copies it if it is in the tail or its tensor is only copied. All loads come before the first
/// use of any, so that a thread waits for memory once. If the token has no row in the tables, all channels become NaN;
/// with several axes only the pairs without a row do.
template <typename Policy, typename T>
__device__ void rotate_chunk(const RotaryProblem& problem, const Place<T>& place, int chunk) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  const ChunkChannels channels = channels_of_chunk<Policy>(problem, chunk);
  const bool rotates = channels.rotates && !(Policy::kCopies && place.copied);
  HeadChunk<T, Policy> x;
  x.template load<Policy::kSplat>(place.in, place.in_stride, channels);
  // Each branch stores for itself. If the branches joined before the stores, the compiler would unpack the vectors, and
  // so wait for them, before the branch (1.13 instead of less than 1.05 times the copy with a tail, measured on an
  // H200).
  const auto rotate_by = [&](const ChunkTables<T, Policy>& tables) {
#pragma unroll
    for (int p = 0; p < V; ++p) {
      tables.rotate(p, x[first_of_pair<Policy>(p)], x[second_of_pair<Policy>(p)]);
    }
    x.store(place.out, place.out_stride, channels);
  };
  if constexpr (Policy::kAxes) {
    if (rotates) {
      rotate_by(ChunkTables<T, Policy>::by_axis_of_vector(problem, place.batch, place.seq, channels));
      return;
    }
  } else {
    const TableRow<Real> row = table_row<Real>(problem, place.batch, place.seq);
    if (rotates) {
      rotate_by(ChunkTables<T, Policy>(problem, row, channels, /*exists=*/true));
      return;
    }
    if (row.sign != row.sign && !place.copied) {
      x.a = x.b = splat<V>(narrow<T>(row.sign));
    }
  }
  x.store(place.out, place.out_stride, channels);
}

/// Rotates the same chunk of several heads of a token, or copies it, where the pairs of a vector read rows of different
/// axes, as in the cycles of Qwen3-VL. The threads of a token load each entry of the tables once into shared memory,
/// and read it from there in vectors; without that, a thread would load 2 V single numbers. This takes two waits for
/// memory, one after the other, so a thread has several heads in flight: 1.04 times the copy with three, 1.08 with
/// two, 1.27 with one, 1.07 with four, and 1.32 without shared memory, measured on an H100 with bfloat16, 4 x 8192
/// tokens, 32 and 8 heads of 128. All threads of a block take part.
///
/// @param exist  which of the heads exist.
/// @param has_token  whether the token exists.
template <typename Policy, typename T, int Heads>
__device__ void rotate_chunks_of_mixed_axes(
    const RotaryProblem& problem,
    const Place<T> (&places)[Heads],
    const bool (&exist)[Heads],
    int chunk,
    bool has_token) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr int kStep = kTableVector<Real, V>;
  alignas(kMaxVectorBytes) __shared__ Real cosines[kMaxThreads * V];
  alignas(kMaxVectorBytes) __shared__ Real sines[kMaxThreads * V];

  const ChunkChannels channels = channels_of_chunk<Policy>(problem, chunk);
  HeadChunk<T, Policy> x[Heads];
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    if (exist[h]) {
      x[h].template load<false>(places[h].in, places[h].in_stride, channels);
    }
  }
  const int num_pairs = static_cast<int>(problem.num_pairs);
  const int num_entries = static_cast<int>(blockDim.x) * V;  // of a token in this block
  const int first_entry = static_cast<int>(threadIdx.z) * num_entries;
  const int first_chunk = static_cast<int>(blockIdx.y * blockDim.x);
  const int num_threads = static_cast<int>(blockDim.x * blockDim.y);
  if (has_token) {
    for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < num_entries; i += num_threads) {
      if (first_chunk + i / V < num_pairs / V) {
        const int pair = pair_of_chunk<Policy>(first_chunk + i / V, i % V, num_pairs);
        const auto row = table_row<Real>(problem, places[0].batch, places[0].seq, problem.pair_axes.axis(pair));
        const Real* cos = static_cast<const Real*>(problem.cos.data) + row.cos;
        const Real* sin = static_cast<const Real*>(problem.sin.data) + row.sin;
        cosines[first_entry + i] = cos[pair * problem.cos.stride_pair];
        sines[first_entry + i] = row.sign * sin[pair * problem.sin.stride_pair];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < Heads; ++h) {
    if (!exist[h]) {
      continue;
    }
    x[h].keep_packed();
    if (channels.rotates && !places[h].copied) {
      const int own = first_entry + static_cast<int>(threadIdx.x) * V;
#pragma unroll
      for (int p = 0; p < V; p += kStep) {
        const auto cos = load<kStep>(cosines + own + p);
        const auto sin = load<kStep>(sines + own + p);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          rotate_pair(x[h][first_of_pair<Policy>(p + i)], x[h][second_of_pair<Policy>(p + i)], cos[i], sin[i]);
        }
      }
    }
    x[h].store(places[h].out, places[h].out_stride, channels);
  }
}

/// Blocks that an SM holds at least. With mixed axes the three heads of a thread take 72 registers.
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
    rotate_chunks_of_mixed_axes<Policy>(problem, places, exist, chunk, has_token);
  } else if (exists(first_head)) {
    rotate_chunk<Policy>(problem, place_of(first_head), chunk);
  }
}

}  // namespace posenc::cuda
