#pragma once

#include <arguments/attention_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/mma.cuh>
#include <cuda/detail/vector.cuh>

#include <cmath>
#include <cstdint>

// What the forward and the backward pass of attention share: sequences and their tiles, positions, bias and masks, and
// matrix products of tiles in shared memory. No torch.
namespace posenc::cuda {

constexpr float kLog2E = 1.4426950408889634F;
constexpr float kLn2 = 0.6931471805599453F;

/// The sequence of a block, clipped to the memory of the tensors.
struct Sequence {
  int32_t index;
  int64_t q_first, k_first;  // token 0 in packed tensors; 0 otherwise
  int32_t q_len, k_len;      // tokens of the sequence
  int32_t q_rows, k_rows;    // tokens that the block may write: with padded tensors, also those past the lengths
  int32_t offset;            // position of query 0
  bool valid;                // lengths are not negative, at most the largest length and within the tensors
};

__device__ inline Sequence padded_sequence(const AttentionProblem& p, int batch) {
  const int64_t q_len = p.seqlens_q == nullptr ? p.q_len : p.seqlens_q[batch];
  const int64_t k_len = p.seqlens_k == nullptr ? p.k_len : p.seqlens_k[batch];
  Sequence s{batch, 0, 0, static_cast<int32_t>(q_len), static_cast<int32_t>(k_len), p.q_len, p.k_len, 0, true};
  s.valid = q_len >= 0 && q_len <= p.q_len && k_len >= 0 && k_len <= p.k_len;
  s.offset = p.has_offset ? p.query_offset : s.k_len - s.q_len;
  return s;
}

__device__ inline Sequence packed_sequence(const AttentionProblem& p, int batch) {
  const int64_t q_begin = p.cu_seqlens_q[batch];
  const int64_t k_begin = p.cu_seqlens_k[batch];
  const int64_t q_end = p.cu_seqlens_q[batch + 1];
  const int64_t k_end = p.cu_seqlens_k[batch + 1];
  const int64_t q_len = q_end - q_begin;
  const int64_t k_len = k_end - k_begin;
  Sequence s{batch, q_begin, k_begin, static_cast<int32_t>(q_len), static_cast<int32_t>(k_len), 0, 0, 0, true};
  s.valid = q_begin >= 0 && q_len >= 0 && q_len <= p.q_len && q_end <= p.q_tokens && k_begin >= 0 && k_len >= 0 &&
      k_len <= p.k_len && k_end <= p.k_tokens;
  if (!s.valid) {
    s.q_first = max(int64_t{0}, q_begin);
    s.k_first = max(int64_t{0}, k_begin);
  }
  s.q_rows = static_cast<int32_t>(max(int64_t{0}, min(q_end, p.q_tokens) - s.q_first));
  s.k_rows = static_cast<int32_t>(max(int64_t{0}, min(k_end, p.k_tokens) - s.k_first));
  s.offset = p.has_offset ? p.query_offset : s.k_len - s.q_len;
  return s;
}

/// A tile of the rows of queries or of keys of a sequence.
struct TileOfSequence {
  Sequence sequence;
  int32_t first;  // first row of the tile in the sequence
  bool any;       // whether the tile has rows
};

/// Finds the sequence of tile `tile` of `rows` rows. Tile i of packed sequence b is number `cu_seqlens[b] / rows + b +
/// i`: no two tiles have the same number, and there are at most `T / rows + B` numbers, which the host knows.
__device__ inline TileOfSequence find_tile(const AttentionProblem& p, int tile, int batch, int rows, bool of_queries) {
  const int64_t* const cu_seqlens = of_queries ? p.cu_seqlens_q : p.cu_seqlens_k;
  if (cu_seqlens == nullptr) {
    return {padded_sequence(p, batch), tile * rows, true};
  }
  const auto number = [&](int b) { return cu_seqlens[b] / rows + b; };
  int low = 0;
  int high = p.batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (number(middle) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Sequence s = packed_sequence(p, low);
  const int64_t first = (tile - number(low)) * rows;
  const int64_t most = of_queries ? s.q_rows : s.k_rows;
  return {s, static_cast<int32_t>(first), first >= 0 && first < most};
}

/// The slope of a head, 0 without slopes.
template <typename Real>
__device__ Real slope_of(const AttentionProblem& p, const Sequence& s, int head) {
  return p.slopes == nullptr ? Real(0) : static_cast<const Real*>(p.slopes)[s.index * p.slopes_stride + head];
}

/// Rows of a head in memory.
template <typename T>
struct HeadRows {
  const T* first;
  int64_t stride;
};

template <typename T>
__device__ HeadRows<T> rows_of_head(
    const void* data,
    const HeadStrides& strides,
    const Sequence& sequence,
    int64_t first_token,
    int head) {
  const int64_t batch = strides.batch * sequence.index;
  return {static_cast<const T*>(data) + batch + first_token * strides.token + head * strides.head, strides.token};
}

__device__ inline int64_t row_index(const RowStrides& strides, const Sequence& sequence, int head, int64_t token) {
  return strides.batch * sequence.index + strides.head * head + strides.token * token;
}

/// Starts to copy rows `first` to `first + Rows - 1` to a tile. Rows before `begin` and from `end` on are zero, and so
/// are channels from `head_dim` on.
template <int Rows, int D, int Threads, typename T>
__device__ void start_tile(uint32_t to, const HeadRows<T>& from, int first, int begin, int end, int head_dim) {
  constexpr int kChunks = D / mma::kChunk;
  constexpr int kPass = Threads / kChunks;  // rows that the block copies at once
  static_assert(Rows % kPass == 0 && (kPass & (kPass - 1)) == 0);
  const int row = static_cast<int>(threadIdx.x) / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const auto count = static_cast<unsigned>(chunk * mma::kChunk < head_dim ? max(0, end - begin) : 0);
  const int after_begin = first + row - begin;
  const T* source = from.first + (first + row) * from.stride + chunk * mma::kChunk;
  const uint32_t place = mma::chunk_address<D>(to, row, chunk, 0);
#pragma unroll
  for (int i = 0; i < Rows / kPass; ++i) {
    // As `chunk_address` of row `row + i * kPass`.
    const uint32_t permuted = place ^ static_cast<uint32_t>(i * kPass % 8 * 16);
    const bool valid = static_cast<unsigned>(after_begin + i * kPass) < count;
    mma::start_copy(permuted + i * kPass * D * 2, valid ? source : from.first, valid);
    source += kPass * from.stride;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products. A warp multiplies 16 rows of a tile with all rows of another one.

/// `scores[m][n] = rows others^T` for rows `first_row + 16 m` to `first_row + 16 m + 15` of `rows`, and `8 N` rows of
/// `others`. `first_row` is a multiple of 16.
template <typename T, int D, int M, int N>
__device__ void multiply_transposed(float (&scores)[M][N][4], uint32_t rows, int first_row, uint32_t others) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  rows += first_row * D * 2;
#pragma unroll
  for (auto& of_rows : scores) {
#pragma unroll
    for (auto& sum : of_rows) {
      sum[0] = sum[1] = sum[2] = sum[3] = 0;
    }
  }
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t a[M][4];
    const uint32_t of_rows = mma::chunk_address<D>(rows, lane % 16, lane / 16, step * 2);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      mma::load_matrices(a[m], of_rows + m * 16 * D * 2);
    }
    const uint32_t of_others = mma::chunk_address<D>(others, lane % 8 + lane / 16 * 8, lane / 8 % 2, step * 2);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      mma::load_matrices(b, of_others + n * 8 * D * 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma::multiply<T>(scores[m][n], a[m], b[0], b[1]);
        mma::multiply<T>(scores[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/// The factor of a score, or with a softcap of its hyperbolic tangent, in a binary exponent.
__device__ inline float binary_scale(const AttentionProblem& p) {
  return static_cast<float>(p.softcap != 0 ? p.softcap : p.scale) * kLog2E;
}

/// `tanh(scale score / softcap)`.
__device__ inline float tanh_of_score(float score, const AttentionProblem& p) {
  return tanhf(score * static_cast<float>(p.scale / p.softcap));
}

/// `sums[m] += weights[m] tile` for channels `first_channel` to `first_channel + 8 C - 1` of the `8 N` rows of `tile`.
/// Weights are rounded to T.
template <typename T, int D, int M, int N, int C>
__device__ void add_product(float (&sums)[M][C][4], const float (&weights)[M][N][4], uint32_t tile, int first_channel) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int step = 0; step < N / 2; ++step) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const auto& left = weights[m][2 * step];
      const auto& right = weights[m][2 * step + 1];
      a[m][0] = mma::pack<T>(left[0], left[1]);
      a[m][1] = mma::pack<T>(left[2], left[3]);
      a[m][2] = mma::pack<T>(right[0], right[1]);
      a[m][3] = mma::pack<T>(right[2], right[3]);
    }
#pragma unroll
    for (int c = 0; c < C; c += 2) {
      uint32_t b[4];
      const uint32_t address = mma::chunk_address<D>(tile, lane % 16, lane / 16 + first_channel / mma::kChunk, c);
      mma::load_transposed(b, address + step * 16 * D * 2);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma::multiply<T>(sums[m][c], a[m], b[0], b[1]);
        mma::multiply<T>(sums[m][c + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <int C>
__device__ void clear_row(float (&sums)[C][4], int half) {
#pragma unroll
  for (auto& sum : sums) {
    sum[2 * half] = sum[2 * half + 1] = 0;
  }
}

__device__ inline void store_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = {a, b};
}
template <typename T>
__device__ void store_pair(T* to, float a, float b) {
  *reinterpret_cast<uint32_t*>(to) = mma::pack<T>(a, b);
}

/// Writes the two channels of each product of a thread, `factor * sum` rounded to T.
template <typename T, int C>
__device__ void store_row(T* row, const float (&sums)[C][4], int half, float factor, int first_channel, int head_dim) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const int channel = first_channel + c * 8 + lane % 4 * 2;
    if (channel < head_dim) {
      store_pair(row + channel, sums[c][2 * half] * factor, sums[c][2 * half + 1] * factor);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Positions

/// Positions of queries, and which keys they see. Distances are relative to the key that is nearest to the query, so
/// that they are exact however far the query is from all keys.
struct Positions {
  int32_t offset, k_len, left, right;

  __device__ Positions(const AttentionProblem& p, const Sequence& s)
      : offset(s.offset), k_len(s.k_len), left(p.window_left), right(p.window_right) {}

  __device__ int of(int query) const { return query + offset; }
  __device__ int nearest(int position) const { return max(0, min(position, k_len - 1)); }
  /// The distance of the nearest key.
  __device__ int away(int position) const { return abs(position - nearest(position)); }
  __device__ int first_key(int position) const { return max(0, position - left); }
  __device__ int end_key(int position) const { return min(k_len, position + right + 1); }
  __device__ bool sees(int position, int key) const {
    const int first = first_key(position);
    return static_cast<unsigned>(key - first) < static_cast<unsigned>(max(0, end_key(position) - first));
  }
};

/// How the keys of a tile lie for the queries of a tile.
enum class Side { behind, ahead, mixed };

/// `behind` or `ahead` if all queries see all keys, and all keys are at or before, or at or after, all queries.
/// Distances are then linear in key and query.
__device__ inline Side side_of(const Positions& x, int first_position, int last_position, int first_key, int keys) {
  const int last_key = first_key + keys - 1;
  const bool all = first_key >= x.first_key(last_position) && last_key < x.end_key(first_position);
  if (all && last_key <= first_position) {
    return Side::behind;
  }
  return all && first_key >= last_position ? Side::ahead : Side::mixed;
}

}  // namespace posenc::cuda
