#pragma once

#include <cuda/detail/attention_grad_slopes.cuh>
#include <cuda/detail/attention_row_terms.cuh>
#include <cuda/detail/attention_slope_sums.cuh>
#include <cuda/detail/attention_tile.cuh>
#include <cuda/detail/reduce.cuh>

// The backward pass of attention on tensor cores, with the probabilities computed again (Dao et al. 2022,
// https://arxiv.org/abs/2205.14135, appendix B). One kernel computes the gradients of keys and values, another one that
// of queries and the sums for the slopes. This takes seven matrix products instead of five, but it needs no atomic
// additions: the result has the same bits every time, and no float32 copy of a gradient is stored. No torch.
namespace posenc::cuda {

/// Whether a block holds a tile of keys and reads queries, or the other way round.
enum class Held { keys, queries };

/// Sizes of the tiles for heads of up to D channels.
template <int D>
struct AttentionBackwardTile {
  /// Warps that share rows divide the channels of the results, whose sums fill the registers.
  static constexpr int kSplit = D <= 128 ? 1 : 2;
  static constexpr int kRowWarps = kAttentionRowWarps;
  static constexpr int kThreads = kRowWarps * kSplit * kWarp;
  static constexpr int kHeld = kAttentionHeldRows;
  static constexpr int kRead = D <= 128 ? 64 : 32;  // rows of the tiles that it reads
  static constexpr int kStages = D <= 128 ? 2 : 1;  // tiles in shared memory
  static constexpr int kRowBytes = D * 2;
  static constexpr int kTermsBytes = kRead * static_cast<int>(sizeof(float2));
  static constexpr int kStageBytes = 2 * kRead * kRowBytes + kTermsBytes;
  static constexpr int kShared = 2 * kHeld * kRowBytes + kStages * kStageBytes;
  static constexpr int kBlocks = D <= 128 ? 2 : 1;  // blocks of an SM, at least
};

/// @tparam kSlopeSums  also computes the sums for the slopes; with a softcap it computes no other result.
template <typename T, int D, Held kHeld, bool kSlopeSums>
__global__ void __launch_bounds__(AttentionBackwardTile<D>::kThreads, AttentionBackwardTile<D>::kBlocks)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardProblem problem) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using Tile = AttentionBackwardTile<D>;
  constexpr bool kOfKeys = kHeld == Held::keys;
  constexpr int kColumns = Tile::kRead / 8;
  constexpr int kChannels = D / Tile::kSplit;
  extern __shared__ __align__(1024) unsigned char memory[];  // tiles are multiples of their rows
  __shared__ double scratch[kWarp];
  const uint32_t held_a = mma::shared_address(memory);             // keys, or queries
  const uint32_t held_b = held_a + Tile::kHeld * Tile::kRowBytes;  // values, or gradients of the output
  constexpr int kStagesBegin = 2 * Tile::kHeld * Tile::kRowBytes;
  const auto read_a = [&](int stage) { return held_a + kStagesBegin + stage * Tile::kStageBytes; };
  const auto read_b = [&](int stage) { return read_a(stage) + Tile::kRead * Tile::kRowBytes; };
  const auto terms_of = [&](int stage) {  // {shift, delta} of the queries of a tile
    return reinterpret_cast<float2*>(
        memory + kStagesBegin + stage * Tile::kStageBytes + 2 * Tile::kRead * Tile::kRowBytes);
  };

  const int tile_index = static_cast<int>(kOfKeys ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
  const TileOfSequence tile =
      find_tile(problem, tile_index, static_cast<int>(blockIdx.z), Tile::kHeld, /*of_queries=*/!kOfKeys);
  if (!tile.any) {
    return;
  }
  const Sequence& sequence = tile.sequence;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first_row = warp % Tile::kRowWarps * 16;
  const int first_channel = warp / Tile::kRowWarps * kChannels;
  const Positions positions(problem, sequence);
  const int q_end = sequence.valid ? sequence.q_len : 0;
  const int k_end = sequence.valid ? sequence.k_len : 0;
  const float scale = binary_scale(problem);

  // Rows of the other kind that some row of the tile sees or is seen by.
  const int held_end = kOfKeys ? k_end : q_end;
  const int last_held = min(tile.first + Tile::kHeld, held_end) - 1;
  int read_begin = 0;
  int read_end = 0;
  if (tile.first < held_end) {
    if constexpr (kOfKeys) {
      read_begin = max(0, tile.first - positions.right - positions.offset);
      read_end = min(q_end, last_held + positions.left - positions.offset + 1);
    } else {
      read_begin = positions.first_key(positions.of(tile.first));
      read_end = positions.end_key(positions.of(last_held));
    }
  }
  const int first_tile = read_begin / Tile::kRead * Tile::kRead;
  const int tiles = read_end > read_begin ? (read_end - first_tile + Tile::kRead - 1) / Tile::kRead : 0;
  const int heads = kOfKeys ? problem.group : 1;
  const int first_head = static_cast<int>(blockIdx.y) * heads;
  const int key_head = first_head / problem.group;

  const auto queries = [&](int head) {
    return rows_of_head<T>(problem.q, problem.q_strides, sequence, sequence.q_first, head);
  };
  const auto gradients = [&](int head) {
    return rows_of_head<T>(problem.grad_out, problem.grad_out_strides, sequence, sequence.q_first, head);
  };
  const auto keys = rows_of_head<T>(problem.k, problem.k_strides, sequence, sequence.k_first, key_head);
  const auto values = rows_of_head<T>(problem.v, problem.v_strides, sequence, sequence.k_first, key_head);
  const auto binary_slope = [&](int head) { return slope_of<float>(problem, sequence, head) * kLog2E; };
  const auto terms_of_row = [&](int head, int row) {
    const auto* const terms = reinterpret_cast<const float2*>(problem.row_terms);
    return row < q_end ? terms[row_index(problem.row_terms_strides, sequence, head, sequence.q_first + row)]
                       : float2{INFINITY, 0};
  };
  const auto side_of_tile = [&](int first_read) {
    const int first_query = kOfKeys ? first_read : tile.first;
    const int query_rows = kOfKeys ? Tile::kRead : Tile::kHeld;
    const int last_query = min(first_query + query_rows, q_end) - 1;
    return side_of(
        positions, positions.of(first_query), positions.of(last_query), kOfKeys ? tile.first : first_read,
        kOfKeys ? Tile::kHeld : Tile::kRead);
  };
  /// The exponent of a row on one side of the keys from `first_key` on, without the terms of the score and the column.
  const auto linear_term = [&](Side side, float slope, int row, int first_key, float shift) {
    const float ahead = static_cast<float>(first_key - positions.nearest(positions.of(row)));
    return fmaf(side == Side::ahead ? -slope : slope, ahead, -shift);
  };

  // Step i of all heads reads tile `i % tiles` of head `first_head + i / tiles`.
  const int steps = tiles * heads;
  const auto start_step = [&](int step) {
    if (step < steps) {
      const int head = first_head + step / tiles;
      const int first = first_tile + step % tiles * Tile::kRead;
      const int stage = step % Tile::kStages;
      constexpr int kThreads = Tile::kThreads;
      if constexpr (kOfKeys) {
        start_tile<Tile::kRead, D, kThreads>(
            read_a(stage), queries(head), first, read_begin, read_end, problem.head_dim);
        start_tile<Tile::kRead, D, kThreads>(
            read_b(stage), gradients(head), first, read_begin, read_end, problem.head_dim);
        if (threadIdx.x < Tile::kRead) {
          const int row = first + static_cast<int>(threadIdx.x);
          float2 terms = terms_of_row(head, row);
          const Side side = side_of_tile(first);
          terms.x = side == Side::mixed ? terms.x : -linear_term(side, binary_slope(head), row, tile.first, terms.x);
          terms_of(stage)[threadIdx.x] = terms;
        }
      } else {
        start_tile<Tile::kRead, D, kThreads>(read_a(stage), keys, first, read_begin, read_end, problem.head_dim);
        start_tile<Tile::kRead, D, kThreads>(read_b(stage), values, first, read_begin, read_end, problem.head_dim);
      }
    }
    mma::commit_copies();
  };

  // The terms of the rows of a thread, if the block holds queries.
  float2 of_row[2] = {};
  SlopeSums<double> sums[2];
  SlopeSums<float> recent[2];
  if constexpr (kOfKeys) {
    start_tile<Tile::kHeld, D, Tile::kThreads>(held_a, keys, tile.first, 0, k_end, problem.head_dim);
    start_tile<Tile::kHeld, D, Tile::kThreads>(held_b, values, tile.first, 0, k_end, problem.head_dim);
  } else {
    start_tile<Tile::kHeld, D, Tile::kThreads>(held_a, queries(first_head), tile.first, 0, q_end, problem.head_dim);
    start_tile<Tile::kHeld, D, Tile::kThreads>(held_b, gradients(first_head), tile.first, 0, q_end, problem.head_dim);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      of_row[half] = terms_of_row(first_head, tile.first + first_row + lane / 4 + half * 8);
    }
  }

  float grad_a[1][kChannels / 8][4] = {};                  // of keys, or of queries
  float grad_b[1][kOfKeys ? kChannels / 8 : 1][4] = {};    // of values
  const int held_row = tile.first + first_row + lane / 4;  // and held_row + 8

  /// Replaces scores by probabilities P, and `dp`, dP, by dS = P (dP - delta).
  const auto to_gradients = [&](float(&scores)[1][kColumns][4], float(&dp)[1][kColumns][4], int step) {
    const float slope = binary_slope(first_head + step / tiles);
    const int first_read = first_tile + step % tiles * Tile::kRead;
    const float2* const terms = terms_of(step % Tile::kStages);
    const Side side = side_of_tile(first_read);
    const float bend = side == Side::ahead ? -slope : slope;
    const int first_column = lane % 4 * 2;
    // Calls `body(half, n, i, row, column)` for each product.
    const auto for_each = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          body(i / 2, n, i, held_row + i / 2 * 8, n * 8 + first_column + i % 2);
        }
      }
    };
    if (problem.softcap != 0) {
      for_each([&](int half, int n, int i, int /*row*/, int column) {
        const float tanh = tanh_of_score(scores[0][n][i], problem);
        scores[0][n][i] = tanh;
        if constexpr (!kSlopeSums) {
          // dS below is p (dp - delta), times the derivative of the softcap, 1 - tanh^2.
          const float delta = kOfKeys ? terms[column].y : of_row[half].y;
          dp[0][n][i] = fmaf(dp[0][n][i] - delta, fmaf(-tanh, tanh, 1.0F), delta);
        }
      });
    }
    SlopeSums<float> of_tile[2];
    const auto add = [&](int half, float p, float product, float distance) {
      if constexpr (kSlopeSums) {
        of_tile[half].p += p;
        of_tile[half].distance += p * distance;
        of_tile[half].dp += product;
        of_tile[half].product += product * distance;
      }
    };
    if (side == Side::mixed) {
      for_each([&](int half, int n, int i, int row, int column) {
        const int other = first_read + column;
        const int position = positions.of(kOfKeys ? other : row);
        const int key = kOfKeys ? row : other;
        const float2 term = kOfKeys ? terms[column] : of_row[half];
        const float distance = static_cast<float>(abs(position - key) - positions.away(position));
        const float exponent = fmaf(scores[0][n][i], scale, fmaf(-slope, distance, -term.x));
        // A hidden pair contributes nothing, also if its products are NaN. The shift of rows past the length is
        // infinite.
        const bool sees = term.x != INFINITY && positions.sees(position, key);
        const float p = sees ? approximate_exp2(exponent) : 0.0F;
        add(half, p, sees ? p * dp[0][n][i] : 0.0F, distance);
        scores[0][n][i] = p;
        dp[0][n][i] = sees ? p * (dp[0][n][i] - term.y) : 0.0F;
      });
    } else {
      // Terms of the rows of the block, and of a column.
      float base[2];
      float away[2];  // the distance of column 0, with its sign
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kOfKeys) {
          base[half] = bend * static_cast<float>(first_row + lane / 4 + half * 8);
        } else {
          base[half] = linear_term(side, slope, held_row + half * 8, first_read, of_row[half].x);
          const int nearest = positions.nearest(positions.of(held_row + half * 8));
          away[half] = static_cast<float>(side == Side::ahead ? first_read - nearest : nearest - first_read);
        }
      }
      for_each([&](int half, int n, int i, int /*row*/, int column) {
        float exponent = 0;
        float delta = 0;
        if constexpr (kOfKeys) {
          const float2 term = terms[column];
          exponent = fmaf(scores[0][n][i], scale, base[half] - term.x);
          delta = term.y;
        } else {
          exponent = fmaf(scores[0][n][i], scale, fmaf(bend, static_cast<float>(column), base[half]));
          delta = of_row[half].y;
        }
        const float p = approximate_exp2(exponent);
        add(half, p, p * dp[0][n][i], static_cast<float>(column));
        scores[0][n][i] = p;
        dp[0][n][i] = p * (dp[0][n][i] - delta);
      });
      if constexpr (kSlopeSums) {
        const float factor = side == Side::ahead ? 1.0F : -1.0F;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          of_tile[half].distance = fmaf(factor, of_tile[half].distance, away[half] * of_tile[half].p);
          of_tile[half].product = fmaf(factor, of_tile[half].product, away[half] * of_tile[half].dp);
        }
      }
    }
    if constexpr (kSlopeSums) {
      recent[0].add(of_tile[0]);
      recent[1].add(of_tile[1]);
      // Conversions to float64 are slow.
      if (step % 4 == 3 || step + 1 == steps) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          sums[half].add(recent[half]);
          recent[half] = {};
        }
      }
    }
  };

#pragma unroll
  for (int step = 0; step + 1 < Tile::kStages; ++step) {
    start_step(step);
  }
  for (int step = 0; step < steps; ++step) {
    if constexpr (Tile::kStages == 1) {
      __syncthreads();  // no warp reads the previous tiles
      start_step(step);
    }
    mma::wait_copies<0>();
    __syncthreads();
    if constexpr (Tile::kStages > 1) {
      start_step(step + Tile::kStages - 1);
    }
    const int stage = step % Tile::kStages;
    float scores[1][kColumns][4];
    float dp[1][kColumns][4];
    multiply_transposed<T, D>(scores, held_a, first_row, read_a(stage));
    multiply_transposed<T, D>(dp, held_b, first_row, read_b(stage));
    to_gradients(scores, dp, step);
    if constexpr (kOfKeys) {
      add_product<T, D>(grad_b, scores, read_b(stage), first_channel);
      add_product<T, D>(grad_a, dp, read_a(stage), first_channel);
    } else if (problem.grad_q != nullptr) {
      add_product<T, D>(grad_a, dp, read_a(stage), first_channel);
    }
  }
  mma::commit_copies();
  mma::wait_copies<0>();

  if constexpr (!kOfKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Of rows without a visible key or past the length: a NaN in a key may be in the sums.
      if (sequence.valid && of_row[half].x == INFINITY) {
        clear_row(grad_a[0], half);
        sums[half] = {};
      }
    }
  }
  const auto store = [&](void* to, const HeadStrides& strides, auto& grad, float factor, int head) {
    if (to == nullptr) {
      return;
    }
    T* const of_head = static_cast<T*>(to) + strides.batch * sequence.index + strides.head * head;
    const int64_t first_token = kOfKeys ? sequence.k_first : sequence.q_first;
    const int rows = kOfKeys ? sequence.k_rows : sequence.q_rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = held_row + half * 8;
      if (row < rows) {
        T* const place = of_head + (first_token + row) * strides.token;
        store_row<T>(place, grad[0], half, sequence.valid ? factor : NAN, first_channel, problem.head_dim);
      }
    }
  };
  const int head = static_cast<int>(blockIdx.y);
  if constexpr (kOfKeys) {
    store(problem.grad_k, problem.grad_k_strides, grad_a, static_cast<float>(problem.scale), head);
    store(problem.grad_v, problem.grad_v_strides, grad_b, 1.0F, head);
  } else {
    store(problem.grad_q, problem.grad_q_strides, grad_a, static_cast<float>(problem.scale), head);
  }
  if constexpr (kSlopeSums) {
    double total = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SlopeSums<double>& row = sums[half];
      row.reduce();
      const int i = held_row + half * 8;
      if (lane % 4 != 0 || warp >= Tile::kRowWarps || i >= sequence.q_rows) {
        continue;
      }
      const double away = positions.away(positions.of(i));
      if (row.p != 0) {  // NaN is not 0
        const double mean = row.distance / row.p;
        total += row.product - row.dp * mean;
        if (problem.grad_lse != nullptr && i < q_end) {
          const int64_t token = sequence.q_first + i;
          total += problem.grad_lse[row_index(problem.grad_lse_strides, sequence, head, token)] * (mean + away);
        }
      }
      if (problem.row_sums != nullptr) {
        const int64_t all = static_cast<int64_t>(problem.batch) * problem.q_heads * problem.q_len;
        double* const to =
            problem.row_sums + (static_cast<int64_t>(sequence.index) * problem.q_heads + head) * problem.q_len + i;
        to[0] = row.p;
        to[all] = row.distance + away * row.p;
        to[2 * all] = row.dp;
        to[3 * all] = row.product + away * row.dp;
      }
    }
    total = sum_of_block(sequence.valid ? total : NAN, scratch);
    if (threadIdx.x == 0 && problem.slope_sums != nullptr) {
      problem.slope_sums[(static_cast<int64_t>(head) * gridDim.z + blockIdx.z) * gridDim.x + tile_index] = total;
    }
  }
#else
  __trap();  // never reached: launched on compute capability 8.0 and later only
#endif
}

}  // namespace posenc::cuda
