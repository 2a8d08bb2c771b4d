#pragma once

// The gradient of the slopes of attention from sums over the keys of each row:
//
//     dslopes[h] = -sum over rows of (E[dP d] - E[dP] E[d]),    E[x] = sum over keys of P x.
//
// No torch.
namespace posenc::cuda {

/// Sums over the keys of a row, for the gradient of its slope: of P, P d, P dP and P dP d.
template <typename Real>
struct SlopeSums {
  Real p = 0, distance = 0, dp = 0, product = 0;

  template <typename Other>
  __device__ void add(const SlopeSums<Other>& other) {
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

}  // namespace posenc::cuda
