#pragma once

// Arguments of the ALiBi kernels on CPU and CUDA: pointers, sizes and strides, checked beforehand. No torch.

#include <arguments/host_device.h>

#include <cstdint>

namespace posenc {

/// Strides in elements of scores read as `[B, H, Sq, Sk]`. Scores `[H, Sq, Sk]` have B = 1.
struct ScoreStrides {
  int64_t batch, head, query, key;

  POSENC_HOST_DEVICE int64_t row(int64_t b, int64_t h, int64_t i) const { return b * batch + h * head + i * query; }
};

/// A tensor of the shape of scores that is read or written.
struct ScoresIn {
  const void* data;
  ScoreStrides strides;
};
struct ScoresOut {
  void* data;
  ScoreStrides strides;
};

/// One slope for each head, float32 or float64.
struct SlopesView {
  const void* data;
  int64_t stride;
  bool is_double;

  /// The slope of one head, in `Real`.
  template <typename Real>
  POSENC_HOST_DEVICE Real slope(int64_t head) const {
    const int64_t index = head * stride;
    return is_double ? static_cast<Real>(static_cast<const double*>(data)[index])
                     : static_cast<Real>(static_cast<const float*>(data)[index]);
  }
};

/// Sizes of a call, and which keys a query sees. The checks ensure that all positions and distances fit into int32.
struct AlibiShape {
  int64_t batch, num_heads;
  int32_t q_len, k_len;
  int32_t query_offset;
  bool causal;

  POSENC_HOST_DEVICE int32_t position(int32_t query) const { return query_offset + query; }

  /// The number of keys that a query at `position` sees; it sees the first ones.
  POSENC_HOST_DEVICE int32_t visible(int32_t position) const {
    if (!causal || position >= k_len) {
      return k_len;
    }
    return position < 0 ? 0 : position + 1;
  }

  /// The key that is nearest to `position`. Distances relative to this key differ from the true ones by a constant,
  /// which does not change the softmax, and are exact in float32 for rows of fewer than 2^24 keys.
  POSENC_HOST_DEVICE int32_t nearest_key(int32_t position) const {
    return position < 0 ? 0 : (position < k_len ? position : k_len - 1);
  }

  POSENC_HOST_DEVICE static int32_t distance(int32_t position, int32_t key) {
    const int32_t difference = position - key;
    return difference < 0 ? -difference : difference;
  }

  /// The sum of the distances of the first `visible` keys.
  POSENC_HOST_DEVICE static double sum_of_distances(int32_t position, int32_t visible) {
    const int64_t p = position;
    const int64_t n = visible;
    const int64_t before = p < 0 ? 0 : (p < n ? p + 1 : n);  // number of keys at or before the position
    const int64_t sum_before = before * (before - 1) / 2;
    const int64_t sum_after = n * (n - 1) / 2 - sum_before;
    return static_cast<double>(before * p - sum_before) + static_cast<double>(sum_after - (n - before) * p);
  }
};

/// A call of `alibi_bias` (without `in`), `alibi_add` or `alibi_mask` (without `slopes`).
struct AlibiAddProblem {
  AlibiShape shape;
  SlopesView slopes;
  ScoresIn in;
  ScoresOut out;
};

/// Key padding mask, true where a key is hidden; `data` is null if there is no mask.
struct PaddingView {
  const bool* data;
  int64_t stride_batch, stride_key;
};

struct AlibiSoftmaxProblem {
  AlibiShape shape;
  SlopesView slopes;
  ScoresIn in;
  ScoresOut out;
  PaddingView padding;
  double scale;
};

/// `row_sums` has one float64 entry for each row, `[H, B, Sq]`. Their sums over each head are written to `slopes`,
/// `[H]` in the arithmetic type. Both are null if the gradient of the slopes is not computed.
struct AlibiSoftmaxBackwardProblem {
  AlibiShape shape;
  ScoresIn grad, probs;
  ScoresOut out;
  double* row_sums;
  void* slopes;
  double scale;
};

}  // namespace posenc
