#pragma once

#include <cuda/detail/launch.h>
#include <cuda/detail/rotary_tables.cuh>

// Rotation where the pairs of a vector read rows of different axes, as in the cycles of Qwen3-VL. Entry by entry a
// thread would fetch 2 V single numbers. Instead the threads of a token fetch each number once, and all heads of a
// block take them from shared memory in vectors. That takes two waits for memory, one after the other, and so a thread
// has several heads on their way meanwhile: 1.04 times the copy with three, 1.08 with two, 1.27 with one, 1.07 with
// four, and 1.32 entry by entry, measured on an H100 with bfloat16, 4 x 8192 tokens, 32 and 8 heads of 128. No torch.
namespace posenc::cuda {

/// Rotates the same chunk of several heads of a token, or copies it. All threads of a block take part: `has_token` says
/// whether there is a token to fetch for, `exist` which heads there are.
template <typename Policy, typename T, int Heads>
__device__ void rotate_chunks_by_stage(
    const RotaryProblem& problem,
    const Place<T> (&places)[Heads],
    const bool (&exist)[Heads],
    int chunk,
    bool has_token) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr int kStep = kTableVector<Real, V>;
  __shared__ alignas(kMaxVectorBytes) Real cosines[kMaxThreads * V];
  __shared__ alignas(kMaxVectorBytes) Real sines[kMaxThreads * V];

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

}  // namespace posenc::cuda
