#pragma once

#include <arguments/alibi_problem.h>
#include <cuda/detail/vector.cuh>

// Distances and biases of scores. No torch.
namespace posenc::cuda {

/// The distance of a key in the arithmetic type, computed in int32.
template <typename Real>
__device__ Real distance(int32_t position, uint32_t key) {
  return static_cast<Real>(AlibiShape::distance(position, static_cast<int32_t>(key)));
}

/// -slope * distance. The product is rounded and never fused with the sum that follows, so all paths give the same
/// bits.
template <typename Real>
__device__ Real bias_of(Real slope, int32_t position, uint32_t key) {
  return multiply(-slope, distance<Real>(position, key));
}

}  // namespace posenc::cuda
