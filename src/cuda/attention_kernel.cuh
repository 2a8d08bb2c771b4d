#pragma once

#include <cuda/detail/attention_tile.cuh>

#include <algorithm>

// The forward pass of attention on tensor cores: a block computes a tile of queries, keeps the running maximum and sum
// of each row (Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 1) and reads keys and values tile by tile. No
// torch.
namespace posenc::cuda {

/// Sizes of the tiles for heads of up to D channels.
template <int D>
struct AttentionTile {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  /// Groups of 16 rows of a warp. Two groups halve the reads of keys and values from shared memory per product.
  static constexpr int kGroups = D <= 128 ? 2 : 1;
  static constexpr int kRows = kWarps * kGroups * 16;
  static constexpr int kKeys = 64;
  static constexpr int kRowBytes = D * 2;
  static constexpr int kShared = (kRows + 2 * kKeys) * kRowBytes;
  static constexpr int kBlocks = D <= 128 ? 2 : 1;  // blocks of an SM, at least
};

/// A row in a thread, and its running sums. Exponents are binary.
struct SoftmaxRow {
  int32_t position;
  float max = -INFINITY;
  float sum = 0;  // over the columns of this thread
};

/// Keys that a block reads: those that some of its rows see, or a part of them.
struct BlockKeys {
  int32_t first_tile, last_tile;  // first keys of the first and the last tile; no tiles if `last_tile` is smaller
  int32_t begin, end;             // keys that some row of the block sees
};

template <typename Tile>
__device__ BlockKeys
keys_of_block(const AttentionForwardProblem& problem, const Positions& positions, int first_row, int q_end, int split) {
  if (first_row >= q_end) {
    return {0, -Tile::kKeys, 0, 0};
  }
  const int last_row = min(first_row + Tile::kRows, q_end) - 1;
  const int begin = positions.first_key(positions.of(first_row));
  const int end = max(0, positions.end_key(positions.of(last_row)));
  const int first_tile = begin / Tile::kKeys;
  const int end_tile = (end + Tile::kKeys - 1) / Tile::kKeys;
  const int share = (max(0, end_tile - first_tile) + problem.splits - 1) / problem.splits;
  const int of_split = first_tile + split * share;
  return {of_split * Tile::kKeys, (min(end_tile, of_split + share) - 1) * Tile::kKeys, begin, end};
}

/// The index of a row in the results of one part of the keys, `[B, Hq, Sq]` or `[Hq, T]`.
__device__ inline int64_t split_row(const AttentionForwardProblem& p, const Sequence& s, int head, int64_t token) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t of_head = packed ? head : static_cast<int64_t>(s.index) * p.q_heads + head;
  return of_head * (packed ? p.q_tokens : p.q_len) + token;
}

template <typename T, int D>
__global__ void __launch_bounds__(AttentionTile<D>::kThreads, AttentionTile<D>::kBlocks)
    attention_kernel(const __grid_constant__ AttentionForwardProblem problem) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Tile = AttentionTile<D>;
  constexpr int kColumns = Tile::kKeys / 8;
  using Scores = float[Tile::kGroups][kColumns][4];
  extern __shared__ __align__(1024) unsigned char memory[];  // tiles are multiples of their rows
  const uint32_t q_tile = mma::shared_address(memory);
  const uint32_t k_tile = q_tile + Tile::kRows * Tile::kRowBytes;
  const uint32_t v_tile = k_tile + Tile::kKeys * Tile::kRowBytes;

  const int head = static_cast<int>(blockIdx.y);
  const int split = static_cast<int>(blockIdx.z) % problem.splits;
  // Tiles of queries that see the most keys come first, so that no long block is left for the end.
  const int tile_index = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const TileOfSequence tile =
      find_tile(problem, tile_index, static_cast<int>(blockIdx.z) / problem.splits, Tile::kRows, /*of_queries=*/true);
  if (!tile.any) {
    return;
  }
  const Sequence& sequence = tile.sequence;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_in_warp = static_cast<int>(threadIdx.x) / kWarp * Tile::kGroups * 16;
  const Positions positions(problem, sequence);
  const int q_end = sequence.valid ? sequence.q_len : 0;
  const auto query = [&](int m, int half) { return tile.first + first_in_warp + m * 16 + half * 8 + lane / 4; };

  const BlockKeys keys = keys_of_block<Tile>(problem, positions, tile.first, q_end, split);
  const int key_head = head / problem.group;
  const auto q = rows_of_head<T>(problem.q, problem.q_strides, sequence, sequence.q_first, head);
  const auto k = rows_of_head<T>(problem.k, problem.k_strides, sequence, sequence.k_first, key_head);
  const auto v = rows_of_head<T>(problem.v, problem.v_strides, sequence, sequence.k_first, key_head);
  const auto start_keys = [&](int first) {
    if (first >= keys.first_tile) {
      start_tile<Tile::kKeys, D, Tile::kThreads>(k_tile, k, first, keys.begin, keys.end, problem.head_dim);
    }
    mma::commit_copies();
  };

  SoftmaxRow rows[Tile::kGroups][2];
  float out[Tile::kGroups][D / 8][4];
#pragma unroll
  for (int m = 0; m < Tile::kGroups; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[m][half].position = positions.of(query(m, half));
    }
#pragma unroll
    for (auto& sum : out[m]) {
      sum[0] = sum[1] = sum[2] = sum[3] = 0;
    }
  }
  const int warp_first = positions.of(tile.first + first_in_warp);
  const int warp_last = warp_first + min(Tile::kGroups * 16, max(1, q_end - tile.first - first_in_warp)) - 1;
  const float scale = binary_scale(problem);
  const float slope = slope_of<float>(problem, sequence, head) * kLog2E;

  // Replaces scores by exponents of 2: scaled, biased and masked. The exponents of a row lack a common term, `base`.
  const auto to_exponents = [&](Scores& scores, float(&base)[Tile::kGroups][2], int first_key) {
    const int first = first_key + lane % 4 * 2;  // key of the first column of the thread
    const Side side = side_of(positions, warp_first, warp_last, first_key, Tile::kKeys);
    if (side == Side::mixed) {
#pragma unroll
      for (int m = 0; m < Tile::kGroups; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = rows[m][half].position;
          const int away = positions.away(position);
          const int begin = positions.first_key(position) - first;
          const auto visible = static_cast<unsigned>(max(0, positions.end_key(position) - first - begin));
          base[m][half] = 0;
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float& score = scores[m][n][2 * half + i];
              const int column = n * 8 + i;
              const float distance = static_cast<float>(abs(position - first - column) - away);
              const bool sees = static_cast<unsigned>(column - begin) < visible;
              score = sees ? fmaf(score, scale, -slope * distance) : -INFINITY;
            }
          }
        }
      }
    } else {
      const float bend = side == Side::ahead ? -slope : slope;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float bias = bend * static_cast<float>(n * 8 + i);
#pragma unroll
          for (int m = 0; m < Tile::kGroups; ++m) {
            scores[m][n][i] = fmaf(scores[m][n][i], scale, bias);
            scores[m][n][2 + i] = fmaf(scores[m][n][2 + i], scale, bias);
          }
        }
      }
#pragma unroll
      for (int m = 0; m < Tile::kGroups; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          base[m][half] = bend * static_cast<float>(first - positions.nearest(rows[m][half].position));
        }
      }
    }
  };

  // Replaces exponents by probabilities relative to the running maximum, and rescales the sums to it.
  const auto to_probabilities = [&](Scores& scores, const float(&base)[Tile::kGroups][2]) {
    float factors[Tile::kGroups][2];
    bool rescale = false;
#pragma unroll
    for (int m = 0; m < Tile::kGroups; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        SoftmaxRow& row = rows[m][half];
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        largest += base[m][half];
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffU, largest, 2));
        largest = fmaxf(largest, row.max);
        const float finite = largest == -INFINITY ? 0.0F : largest;  // no visible key yet
        const float shift = finite - base[m][half];
        rescale |= largest != row.max;
        factors[m][half] = approximate_exp2(row.max - finite);
        row.max = largest;
        row.sum *= factors[m][half];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[m][n][2 * half + i];
            score = approximate_exp2(score - shift);
            row.sum += score;
          }
        }
      }
    }
    // Most maxima are found in the first tiles, those of the nearest keys.
    if (__any_sync(0xffffffffU, rescale)) {
#pragma unroll
      for (int m = 0; m < Tile::kGroups; ++m) {
#pragma unroll
        for (auto& sum : out[m]) {
          sum[0] *= factors[m][0];
          sum[1] *= factors[m][0];
          sum[2] *= factors[m][1];
          sum[3] *= factors[m][1];
        }
      }
    }
  };

  // From the last keys to the first: with a causal mask, those with the least bias come first.
  start_tile<Tile::kRows, D, Tile::kThreads>(q_tile, q, tile.first, 0, q_end, problem.head_dim);
  start_keys(keys.last_tile);
  for (int first_key = keys.last_tile; first_key >= keys.first_tile; first_key -= Tile::kKeys) {
    mma::wait_copies<0>();
    __syncthreads();  // keys have arrived, and no warp reads the previous values
    start_tile<Tile::kKeys, D, Tile::kThreads>(v_tile, v, first_key, keys.begin, keys.end, problem.head_dim);
    mma::commit_copies();
    // A tile may be visible for other warps only.
    const bool sees = tile.first + first_in_warp < q_end && first_key < positions.end_key(warp_last) &&
        first_key + Tile::kKeys > positions.first_key(warp_first);
    Scores scores;
    if (sees) {
      multiply_transposed<T, D>(scores, q_tile, first_in_warp, k_tile);
    }
    mma::wait_copies<0>();
    __syncthreads();  // values have arrived, and no warp reads the keys
    start_keys(first_key - Tile::kKeys);
    if (sees) {
      if (problem.softcap != 0) {
#pragma unroll
        for (auto& of_group : scores) {
#pragma unroll
          for (auto& of_columns : of_group) {
#pragma unroll
            for (float& score : of_columns) {
              score = tanh_of_score(score, problem);
            }
          }
        }
      }
      float base[Tile::kGroups][2];
      to_exponents(scores, base, first_key);
      to_probabilities(scores, base);
      add_product<T, D>(out, scores, v_tile, 0);
    }
  }

  mma::wait_copies<0>();
#pragma unroll
  for (int m = 0; m < Tile::kGroups; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const SoftmaxRow& row = rows[m][half];
      float sum = row.sum;
      sum += __shfl_xor_sync(0xffffffffU, sum, 1);
      sum += __shfl_xor_sync(0xffffffffU, sum, 2);
      const int i = query(m, half);
      if (i >= sequence.q_rows) {
        continue;
      }
      float factor = 1 / sum;
      float lse = (row.max + log2f(sum) - slope * static_cast<float>(positions.away(row.position))) * kLn2;
      if (!sequence.valid) {
        factor = lse = NAN;
      } else if (i >= q_end || sum == 0) {
        lse = -INFINITY;
        // Not by a factor of zero: a NaN in a hidden value may be in the sums.
        clear_row(out[m], half);
        factor = 0;
      }
      const int64_t token = sequence.q_first + i;
      if (problem.splits > 1) {
        const int64_t of_part = split * problem.rows + split_row(problem, sequence, head, token);
        store_row(problem.split_out + of_part * problem.head_dim, out[m], half, factor, 0, problem.head_dim);
        if (lane % 4 == 0) {
          problem.split_lse[of_part] = lse;
        }
        continue;
      }
      T* const results = static_cast<T*>(problem.out) + problem.out_strides.batch * sequence.index +
          problem.out_strides.head * head + problem.out_strides.token * token;
      store_row(results, out[m], half, factor, 0, problem.head_dim);
      if (lane % 4 == 0) {
        problem.lse[row_index(problem.lse_strides, sequence, head, token)] = lse;
      }
    }
  }
#else
  __trap();  // never reached: launched on compute capability 8.0 and later only
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// Results of parts of the keys

constexpr int kMergeThreads = 128;
constexpr int kMergeRows = kMergeThreads / kWarp;

/// Merges the results of all parts of the keys: a warp for each row, `out = sum of exp(lse_i - lse) out_i`.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    attention_merge_kernel(const __grid_constant__ AttentionForwardProblem problem) {
  const int head = static_cast<int>(blockIdx.y);
  const TileOfSequence tile =
      find_tile(problem, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.z), kMergeRows, /*of_queries=*/true);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = tile.first + static_cast<int>(threadIdx.x) / kWarp;
  const Sequence& sequence = tile.sequence;
  if (!tile.any || row >= sequence.q_rows) {
    return;
  }
  const int64_t token = sequence.q_first + row;
  const int64_t of_row = split_row(problem, sequence, head, token);
  float largest = -INFINITY;
  for (int split = 0; split < problem.splits; ++split) {
    largest = fmaxf(largest, problem.split_lse[split * problem.rows + of_row]);
  }
  const float shift = largest == -INFINITY ? 0.0F : largest;
  float sum = 0;
  for (int split = 0; split < problem.splits; ++split) {
    sum += expf(problem.split_lse[split * problem.rows + of_row] - shift);
  }
  T* const results = static_cast<T*>(problem.out) + problem.out_strides.batch * sequence.index +
      problem.out_strides.head * head + problem.out_strides.token * token;
  constexpr int kPairs = kMaxAttentionHeadDim / (2 * kWarp);  // pairs of channels of a lane
  float2 merged[kPairs] = {};
  for (int split = 0; split < problem.splits; ++split) {
    const int64_t part = split * problem.rows + of_row;
    const float weight = sum == 0 ? 0.0F : expf(problem.split_lse[part] - shift) / sum;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int channel = 2 * (lane + i * kWarp);
      if (channel < problem.head_dim) {
        const float2 of_part = *reinterpret_cast<const float2*>(problem.split_out + part * problem.head_dim + channel);
        merged[i].x = fmaf(weight, of_part.x, merged[i].x);
        merged[i].y = fmaf(weight, of_part.y, merged[i].y);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const int channel = 2 * (lane + i * kWarp);
    if (channel < problem.head_dim) {
      store_pair(results + channel, merged[i].x, merged[i].y);
    }
  }
  if (lane == 0) {
    problem.lse[row_index(problem.lse_strides, sequence, head, token)] = sum == 0 ? -INFINITY : shift + logf(sum);
  }
}

}  // namespace posenc::cuda
