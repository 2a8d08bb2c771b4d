#pragma once

#include <cuda/detail/reduce.cuh>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

// The gradient of the slopes of attention, which cuDNN does not give: of its five matrix products two are done again,
// S = q k^T and dP = dout v^T, tile by tile on tensor cores, and summed up on the way:
//
//     dslopes[h] = -sum over rows of E[dP d] - E[dP] E[d],    E[x] = sum over keys of P x,    P = exp(S - lse),
//
// with distances d counted from the nearest key of the row. The mean of dP is rowsum(dout out), but `out` is rounded to
// half: times a distance of thousands that rounding is larger than the gradient. Nothing of the size of the scores is
// stored. No torch.
namespace posenc::cuda {

/// A block takes 16 rows with each of its warps, and keys by the tile: two tiles of k and of v in shared memory, one in
/// use and one on its way.
constexpr int kSlopesWarps = 8;
constexpr int kSlopesThreads = kSlopesWarps * kWarp;
constexpr int kSlopesRows = kSlopesWarps * 16;
constexpr int kSlopesKeys = 64;

/// Tokens of heads, `[B, S, H, D]` with dense channels; strides in elements.
struct HeadRows {
  const void* data;
  int64_t batch, token, head;
};

struct AlibiAttentionSlopesProblem {
  HeadRows q, k, v, grad;    // 16-byte aligned rows
  const float* lse;          // [B, Hq, Sq]
  const float* slopes;       // [Hq]
  const int64_t* seqlens_q;  // [B], or null
  const int64_t* seqlens_k;
  double* sums;  // one of each block, [Hq, B, blocks]
  int32_t q_len, k_len;
  int32_t query_offset;
  int32_t group;  // query heads that share a key head
  float scale;
  bool causal;
};

/// Elements of a row in shared memory. The odd number of 16-byte chunks spreads eight rows over all banks.
template <int D>
constexpr int kSlopesStride = D + 8;

template <int D>
constexpr int kSlopesShared = 2 * 2 * kSlopesKeys * kSlopesStride<D> * 2;

/// The fragments of four 8 x 8 matrices whose rows are given by the lanes.
__device__ inline void load_matrices(uint32_t (&fragments)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
               : "r"(address));
}

/// `sum += a b` for 16 x 16 and 16 x 8.
__device__ inline void multiply(__half /*type*/, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(
    __nv_bfloat16 /*type*/,
    float (&sum)[4],
    const uint32_t (&a)[4],
    uint32_t b0,
    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Sums over the keys of one row.
template <typename Real>
struct RowSums {
  Real p = 0, distance = 0, dp = 0, product = 0;  // of P, P d, P dP and P dP d

  __device__ void add(Real weight, Real d, Real gradient) {
    p += weight;
    distance += weight * d;
    dp += weight * gradient;
    product += weight * gradient * d;
  }
  template <typename Other>
  __device__ void add(const RowSums<Other>& other) {
    p += other.p;
    distance += other.distance;
    dp += other.dp;
    product += other.product;
  }
  /// The sums of the four lanes that share a row.
  __device__ void reduce() {
#pragma unroll
    for (int offset = 1; offset <= 2; offset *= 2) {
      p += __shfl_xor_sync(0xffffffffU, p, offset);
      distance += __shfl_xor_sync(0xffffffffU, distance, offset);
      dp += __shfl_xor_sync(0xffffffffU, dp, offset);
      product += __shfl_xor_sync(0xffffffffU, product, offset);
    }
  }
};

/// Starts the copy of a tile of keys of one head; rows from `end` on are zeros.
template <typename T, int D>
__device__ void start_tile(T* tile, const HeadRows& x, int64_t batch, int64_t head, int begin, int end) {
  constexpr int kChunks = D / 8;
  const T* source = static_cast<const T*>(x.data) + batch * x.batch + head * x.head;
  for (int i = static_cast<int>(threadIdx.x); i < kSlopesKeys * kChunks; i += kSlopesThreads) {
    const int row = i / kChunks;
    const int column = i % kChunks * 8;
    const bool there = begin + row < end;
    const T* from = source + (there ? (begin + row) * x.token + column : 0);
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(tile + row * kSlopesStride<D> + column));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
  }
}

/// Products of 16 rows and a tile of keys. A thread of lane 4 g + t holds rows g and g + 8 of columns 8 n + 2 t and the
/// one after.
template <typename T, int D>
__device__ void tile_products(
    float (&products)[kSlopesKeys / 8][4],
    const uint32_t (&rows)[D / 16][4],
    const T* tile,
    int lane) {
#pragma unroll
  for (auto& product : products) {
    product[0] = product[1] = product[2] = product[3] = 0;
  }
  // Matrices of a lane: keys 0 to 7 and 8 to 15, of each the channels 0 to 7 and 8 to 15.
  const T* row = tile + (lane / 16 * 8 + lane % 8) * kSlopesStride<D> + lane / 8 % 2 * 8;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int pair = 0; pair < kSlopesKeys / 16; ++pair) {
      uint32_t keys[4];
      load_matrices(keys, row + pair * 16 * kSlopesStride<D> + step * 16);
      multiply(T(), products[2 * pair], rows[step], keys[0], keys[1]);
      multiply(T(), products[2 * pair + 1], rows[step], keys[2], keys[3]);
    }
  }
}

template <typename T, int D>
__global__ void __launch_bounds__(kSlopesThreads) alibi_attention_slopes_kernel(AlibiAttentionSlopesProblem problem) {
  constexpr float kLog2E = 1.4426950408889634F;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ double scratch[kWarp];
  constexpr int kTile = kSlopesKeys * kSlopesStride<D>;
  T* const tiles = reinterpret_cast<T*>(memory);

  const int64_t batch = blockIdx.z;
  const int64_t head = blockIdx.y;
  const int64_t key_head = head / problem.group;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int first_row = static_cast<int>(blockIdx.x) * kSlopesRows;
  const auto limit = [batch](const int64_t* lengths, int32_t most) {
    return lengths == nullptr ? most : static_cast<int32_t>(max(int64_t{0}, min(lengths[batch], int64_t{most})));
  };
  const int q_end = limit(problem.seqlens_q, problem.q_len);
  const int k_end = limit(problem.seqlens_k, problem.k_len);
  const int last_position = min(first_row + kSlopesRows, problem.q_len) - 1 + problem.query_offset;
  const int keys = problem.causal ? max(0, min(k_end, last_position + 1)) : k_end;

  const auto start = [&](int tile) {
    T* const to = tiles + tile % 2 * 2 * kTile;
    start_tile<T, D>(to, problem.k, batch, key_head, tile * kSlopesKeys, keys);
    start_tile<T, D>(to + kTile, problem.v, batch, key_head, tile * kSlopesKeys, keys);
    asm volatile("cp.async.commit_group;");
  };
  const int count = (keys + kSlopesKeys - 1) / kSlopesKeys;
  if (count > 0) {
    start(0);
  }

  // What a thread holds of its two rows, as the matrix products take it.
  const int rows[2] = {
      first_row + static_cast<int>(threadIdx.x) / kWarp * 16 + lane / 4,
      first_row + static_cast<int>(threadIdx.x) / kWarp * 16 + lane / 4 + 8};
  const auto pair_of = [&](const HeadRows& x, int row, int column) -> uint32_t {
    return row >= q_end ? 0U
                        : *reinterpret_cast<const uint32_t*>(
                              static_cast<const T*>(x.data) + batch * x.batch + row * x.token + head * x.head + column);
  };
  uint32_t q[D / 16][4];
  uint32_t grad[D / 16][4];
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = rows[i % 2];
      const int column = step * 16 + i / 2 * 8 + lane % 4 * 2;
      q[step][i] = pair_of(problem.q, row, column);
      grad[step][i] = pair_of(problem.grad, row, column);
    }
  }
  float lse[2];
  int nearest[2];  // distance of the nearest key
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int position = rows[i] + problem.query_offset;
    nearest[i] = abs(position - max(0, min(position, k_end - 1)));
    const float of_row =
        rows[i] >= q_end ? -INFINITY : problem.lse[(batch * gridDim.y + head) * problem.q_len + rows[i]];
    // 2^(x - infinity) is 0: a row that sees nothing takes no part.
    lse[i] = of_row == -INFINITY ? INFINITY : of_row * kLog2E;
  }

  const float scale = problem.scale * kLog2E;
  const float slope = problem.slopes[head] * kLog2E;
  RowSums<double> sums[2];
  for (int tile = 0; tile < count; ++tile) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();  // the tile is there, and nobody reads the other one any more
    if (tile + 1 < count) {
      start(tile + 1);
    }
    const T* const k_tile = tiles + tile % 2 * 2 * kTile;
    float scores[kSlopesKeys / 8][4];
    float dp[kSlopesKeys / 8][4];
    tile_products<T, D>(scores, q, k_tile, lane);
    tile_products<T, D>(dp, grad, k_tile + kTile, lane);
    RowSums<float> of_tile[2];
#pragma unroll
    for (int n = 0; n < kSlopesKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile * kSlopesKeys + n * 8 + lane % 4 * 2 + i % 2;
        const int ahead = key - (rows[i / 2] + problem.query_offset);
        const int distance = abs(ahead);
        const bool hidden = key >= keys || (problem.causal && ahead > 0);
        const float p = hidden ? 0.0F : exp2f(scores[n][i] * scale - slope * static_cast<float>(distance) - lse[i / 2]);
        of_tile[i / 2].add(p, static_cast<float>(distance - nearest[i / 2]), dp[n][i]);
      }
    }
    sums[0].add(of_tile[0]);
    sums[1].add(of_tile[1]);
  }
  double total = 0;
#pragma unroll
  for (RowSums<double>& row : sums) {
    row.reduce();
    if (lane % 4 == 0 && row.p != 0) {  // NaN is not 0
      total += row.product - row.dp * row.distance / row.p;
    }
  }
  total = sum_of_block(total, scratch);
  if (threadIdx.x == 0) {
    problem.sums[(head * gridDim.z + batch) * gridDim.x + blockIdx.x] = total;
  }
}

}  // namespace posenc::cuda
