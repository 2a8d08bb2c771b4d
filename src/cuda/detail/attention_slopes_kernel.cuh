#pragma once

#include <cuda/detail/attention_slope_sums.cuh>
#include <cuda/detail/reduce.cuh>
#include <cuda/detail/sm90.cuh>
#include <cuda/detail/vector.cuh>

#include <cmath>
#include <cstdint>
#include <type_traits>

// The gradient of the slopes of attention, which cuDNN does not compute. Two of the five matrix products of the
// backward pass are computed again, S = q k^T and dP = dout v^T, tile by tile on tensor cores, and summed at once:
//
//     dslopes[h] = -sum over rows of (E[dP d] - E[dP] E[d]),    E[x] = sum over keys of P x,
//
// with P = exp(scale S + bias - lse) and distances d relative to the nearest key of the row. E[dP] is also rowsum(dout
// out), but `out` is rounded to 16 bits, and this error times a distance of thousands is larger than the gradient. No
// tensor of the size of the scores is stored. For a call on a part of the keys the result is the sums of each row. No
// torch.
namespace posenc::cuda {

/// Warpgroups of a block, as many as fit with the rows of q and dout in registers. The backward pass with the gradient
/// of the slopes takes 1.45 times as long as that of cuDNN alone; with matrix products of single warps it took 2.4 to
/// 2.8 times as long (one H100, bfloat16, causal, head_dim 128).
constexpr int kSlopesWarpgroups = 2;
constexpr int kSlopesThreads = kSlopesWarpgroups * 4 * kWarp;
/// Keys of a tile, and rows of a warpgroup.
constexpr int kSlopesKeys = 64;
constexpr int kSlopesRows = kSlopesWarpgroups * kSlopesKeys;

struct AlibiAttentionSlopesProblem {
  CUtensorMap q, k, v, grad;  // `[B, S, H, D]` in panels of kSlopesKeys rows
  const float* lse;           // [B, Hq, Sq]
  const float* slopes;        // [Hq]
  const int64_t* seqlens_q;   // [B], or null
  const int64_t* seqlens_k;
  double* sums;      // one for each block, [Hq, B, blocks], or null
  double* row_sums;  // sums of P, P d, P dP and P dP d with the true distances d, [4, B, Hq, Sq], or null
  int32_t q_len, k_len;
  int32_t query_offset;
  int32_t group;  // query heads that share a key head
  float scale;
  bool causal;
};

/// Stages of tiles of k and v in shared memory: one in use, the others being loaded.
template <int D>
struct SlopesTiles {
  static constexpr int kPanels = (D + sm90::kPanelChannels - 1) / sm90::kPanelChannels;
  static constexpr int kPanelBytes = kSlopesKeys * sm90::kPanelRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static constexpr int kStages = D > 192 ? 3 : 4;  // as many as fit
  static constexpr int kShared = kStages * 2 * kBytes + sm90::kTileAlignment;
  // A stage is as large as the rows of a block: q and dout are loaded through the last two stages.
  static_assert(kSlopesWarpgroups == 2);
};

/// The state of a row in a thread.
struct SlopesRow {
  float nearest;  // its nearest key. Distances are relative to it, and exact however far the row is from all keys
  float shift;    // binary logarithm of the divisor of the exponentials, for these distances
};

/// Distances and exponents of a row in a tile. If all keys of the tile are on one side of the row, distances are linear
/// in the column and cost no instruction: `distance = offset + factor * column`. Near the diagonal `column` is the
/// distance itself.
struct SlopesLine {
  float offset, factor;
  float bend, base;  // the exponent is scale * score + bend * column + base

  __device__ static SlopesLine make(const SlopesRow& row, float slope, float offset, float factor) {
    return {offset, factor, -slope * factor, fmaf(-slope, offset, -row.shift)};
  }
  __device__ static SlopesLine distances(const SlopesRow& row, float slope) { return make(row, slope, 0, 1); }
  __device__ static SlopesLine beside(const SlopesRow& row, float slope, float first_column, bool behind) {
    const float ahead = row.nearest - first_column;
    return behind ? make(row, slope, -ahead, 1) : make(row, slope, ahead, -1);
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kSlopesThreads)
    alibi_attention_slopes_kernel(const __grid_constant__ AlibiAttentionSlopesProblem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tiles = SlopesTiles<D>;
  constexpr float kLog2E = 1.4426950408889634F;
  extern __shared__ unsigned char memory[];
  __shared__ double scratch[kWarp];
  __shared__ uint64_t full[Tiles::kStages];
  const uint32_t unaligned = sm90::shared_address(memory);
  const uint32_t tiles = (unaligned + sm90::kTileAlignment - 1) / sm90::kTileAlignment * sm90::kTileAlignment;

  const int batch = static_cast<int>(blockIdx.z);
  const int head = static_cast<int>(blockIdx.y);
  const int key_head = head / problem.group;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  // Blocks of rows that see the most keys come first, so that no long block is left for the end.
  const int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kSlopesRows;
  const auto limit = [batch](const int64_t* lengths, int32_t most) {
    return lengths == nullptr ? most : static_cast<int32_t>(max(int64_t{0}, min(lengths[batch], int64_t{most})));
  };
  const int q_end = limit(problem.seqlens_q, problem.q_len);
  const int k_end = limit(problem.seqlens_k, problem.k_len);
  const int first_position = first_row + problem.query_offset;
  const int last_position = min(first_row + kSlopesRows, problem.q_len) - 1 + problem.query_offset;
  const int keys = problem.causal ? max(0, min(k_end, last_position + 1)) : k_end;
  const int count = (keys + kSlopesKeys - 1) / kSlopesKeys;

  const auto stage = [tiles](int tile) { return tiles + tile % Tiles::kStages * 2 * Tiles::kBytes; };
  // Starts to load two tiles of 64 rows into a stage. Called by one thread.
  const auto start = [&](int to, const CUtensorMap& a, int row_a, const CUtensorMap& b, int row_b, int of_head) {
    uint64_t* const barrier = &full[to % Tiles::kStages];
    sm90::expect_bytes(barrier, 2 * Tiles::kBytes);
#pragma unroll
    for (int panel = 0; panel < Tiles::kPanels; ++panel) {
      const uint32_t place = stage(to) + panel * Tiles::kPanelBytes;
      const int channel = panel * sm90::kPanelChannels;
      sm90::start_panel(place, a, channel, row_a, of_head, batch, barrier);
      sm90::start_panel(place + Tiles::kBytes, b, channel, row_b, of_head, batch, barrier);
    }
  };
  const auto start_keys = [&](int tile) {
    if (threadIdx.x == 0 && tile < count) {
      start(tile, problem.k, tile * kSlopesKeys, problem.v, tile * kSlopesKeys, key_head);
    }
  };
  // The barriers of the last two stages are used first by q or dout, then, like all others, by tiles of keys.
  const auto receive = [&](int tile) {
    const int round = tile / Tiles::kStages + (tile % Tiles::kStages >= Tiles::kStages - 2 ? 1 : 0);
    sm90::wait_bytes(&full[tile % Tiles::kStages], round);
  };

  if (threadIdx.x == 0) {
    for (uint64_t& barrier : full) {
      sm90::init_barrier(&barrier);
    }
    sm90::publish_barriers();
    start(Tiles::kStages - 2, problem.q, first_row, problem.q, first_row + kSlopesKeys, head);
    start(Tiles::kStages - 1, problem.grad, first_row, problem.grad, first_row + kSlopesKeys, head);
  }
#pragma unroll
  for (int tile = 0; tile < Tiles::kStages - 2; ++tile) {
    start_keys(tile);
  }
  __syncthreads();

  // The elements of two rows in a thread, in the layout of the matrix products.
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int rows[2] = {first_row + warp * 16 + lane / 4, first_row + warp * 16 + lane / 4 + 8};
  uint32_t q[D / 16][4];
  uint32_t grad[D / 16][4];
  const auto load = [&](uint32_t(&to)[D / 16][4], int from) {
    sm90::wait_bytes(&full[from], 0);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const uint32_t panel = stage(from) + warp / 4 * Tiles::kBytes + step / 4 * Tiles::kPanelBytes;
      sm90::load_rows(to[step], panel, warp % 4 * 16, step % 4 * 16);
    }
  };
  load(q, Tiles::kStages - 2);
  load(grad, Tiles::kStages - 1);
  sm90::order_copies_after_reads();
  __syncthreads();
  start_keys(Tiles::kStages - 2);
  start_keys(Tiles::kStages - 1);
  const float scale = problem.scale * kLog2E;
  const float slope = problem.slopes[head] * kLog2E;
  const auto nearest = [&](int i) { return max(0, min(rows[i] + problem.query_offset, k_end - 1)); };
  const auto distance_of_nearest = [&](int i) { return abs(rows[i] + problem.query_offset - nearest(i)); };
  SlopesRow of_row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    of_row[i].nearest = static_cast<float>(nearest(i));
    const float lse = rows[i] >= q_end
        ? -INFINITY
        : problem.lse[(static_cast<int64_t>(batch) * gridDim.y + head) * problem.q_len + rows[i]];
    // 2^(x - infinity) is 0: rows that see no key contribute nothing.
    of_row[i].shift =
        lse == -INFINITY ? INFINITY : fmaf(slope, static_cast<float>(distance_of_nearest(i)), lse * kLog2E);
  }

  SlopeSums<double> sums[2];
  SlopeSums<float> recent[2];
  const auto add_tile = [&](int tile, auto near) {
    sm90::Products scores;
    sm90::Products dp;
    sm90::start_products<T>(scores, q, stage(tile));
    sm90::start_products<T>(dp, grad, stage(tile) + Tiles::kBytes);

    const int begin = tile * kSlopesKeys;
    const float first_column = static_cast<float>(begin + lane % 4 * 2);
    SlopesLine lines[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lines[i] = near ? SlopesLine::distances(of_row[i], slope)
                      : SlopesLine::beside(of_row[i], slope, first_column, /*behind=*/begin >= last_position);
    }
    SlopeSums<float> of_tile[2];
    // Calls `body` with row, index and column of each product.
    const auto for_each = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < kSlopesKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float column = static_cast<float>(n * 8 + i % 2);
          if constexpr (decltype(near)::value) {
            column = fabsf(of_row[i / 2].nearest - first_column - column);
          }
          body(i / 2, n, i, column);
        }
      }
    };
    sm90::finish_products<1>(scores);
    for_each([&](int r, int n, int i, float column) {
      const float exponent = fmaf(scores[n][i], scale, fmaf(lines[r].bend, column, lines[r].base));
      float p = approximate_exp2(exponent);
      if constexpr (decltype(near)::value) {
        const int key = begin + n * 8 + lane % 4 * 2 + i % 2;
        p = key >= keys || (problem.causal && key > rows[r] + problem.query_offset) ? 0.0F : p;
      }
      scores[n][i] = p;
      of_tile[r].p += p;
      of_tile[r].distance += p * column;
    });
    sm90::finish_products<0>(dp);
    for_each([&](int r, int n, int i, float column) {
      const float product = scores[n][i] * dp[n][i];
      of_tile[r].dp += product;
      of_tile[r].product += product * column;
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      of_tile[i].distance = fmaf(lines[i].factor, of_tile[i].distance, lines[i].offset * of_tile[i].p);
      of_tile[i].product = fmaf(lines[i].factor, of_tile[i].product, lines[i].offset * of_tile[i].dp);
      recent[i].add(of_tile[i]);
    }
  };
  for (int tile = 0; tile < count; ++tile) {
    receive(tile);
    const int end = (tile + 1) * kSlopesKeys;
    const bool on_one_side = end - 1 <= first_position || (end - kSlopesKeys >= last_position && !problem.causal);
    if (on_one_side && end <= keys) {
      add_tile(tile, std::false_type());
    } else {
      add_tile(tile, std::true_type());
    }
    // Conversions to float64 are slow.
    if (tile % 4 == 3 || tile + 1 == count) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i].add(recent[i]);
        recent[i] = {};
      }
    }
    __syncthreads();
    start_keys(tile + Tiles::kStages);
  }
  double total = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    SlopeSums<double>& row = sums[i];
    row.reduce();
    if (lane % 4 == 0 && row.p != 0) {  // NaN is not 0
      total += row.product - row.dp * row.distance / row.p;
    }
    if (problem.row_sums != nullptr && lane % 4 == 0 && rows[i] < problem.q_len) {
      const int64_t heads = static_cast<int64_t>(gridDim.y) * gridDim.z;
      double* const to = problem.row_sums + (static_cast<int64_t>(batch) * gridDim.y + head) * problem.q_len + rows[i];
      const double away = distance_of_nearest(i);
      to[0] = row.p;
      to[heads * problem.q_len] = row.distance + away * row.p;
      to[2 * heads * problem.q_len] = row.dp;
      to[3 * heads * problem.q_len] = row.product + away * row.dp;
    }
  }
  total = sum_of_block(total, scratch);
  if (threadIdx.x == 0 && problem.sums != nullptr) {
    problem.sums[(static_cast<int64_t>(head) * gridDim.z + batch) * gridDim.x + blockIdx.x] = total;
  }
#else
  __trap();  // never reached: launched on compute capability 9.0 only, which runs the code for sm_90a
#endif
}

}  // namespace posenc::cuda
