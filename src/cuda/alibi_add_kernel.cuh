#pragma once

#include <cuda/detail/launch.h>
#include <cuda/detail/score_grid.h>
#include <cuda/detail/score_vectors.cuh>

// alibi_bias, alibi_add and alibi_mask in one kernel that writes every score once and reads it at most once. A thread
// processes several vectors of one row; consecutive ones are a block's width apart.
namespace posenc::cuda {

enum class AlibiPass {
  bias,  // writes the bias
  add,   // reads scores and writes scores + bias
  mask,  // reads gradients and writes them, zero where the query does not see the key
};

template <int VectorWidth, AlibiPass Pass, bool IsCausal>
struct AlibiPolicy {
  static constexpr int kVectorWidth = VectorWidth;
  static constexpr AlibiPass kPass = Pass;
  static constexpr bool kCausal = IsCausal;
  /// Two 16-byte loads before the first use, as in the rotary kernel. The bias reads nothing: there the number gives a
  /// block enough work to amortise its launch.
  static constexpr int kVectorsPerThread = Pass == AlibiPass::bias || VectorWidth == 1 ? 4 : 2;
};

template <typename T, typename Policy>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) alibi_add_kernel(
    const __grid_constant__ AlibiAddProblem problem,
    const __grid_constant__ Matrices matrices,
    const __grid_constant__ Divider key_groups) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr int U = Policy::kVectorsPerThread;
  constexpr bool kReads = Policy::kPass != AlibiPass::bias;
  const AlibiShape& shape = problem.shape;
  const uint32_t query_group = key_groups.quotient(blockIdx.x);
  const uint32_t key_group = blockIdx.x - query_group * key_groups.divisor;
  const uint32_t query = query_group * blockDim.y + threadIdx.y;
  const uint32_t matrix = Matrices::of_block();
  if (query >= static_cast<uint32_t>(shape.q_len) || matrix >= matrices.count) {
    return;
  }
  const auto [batch, head] = matrices.index(matrix);
  const int32_t position = shape.position(static_cast<int32_t>(query));
  const auto k_len = static_cast<uint32_t>(shape.k_len);
  const uint32_t visible = Policy::kCausal ? static_cast<uint32_t>(shape.visible(position)) : k_len;
  const uint32_t step = blockDim.x * V;
  const uint32_t first = key_group * (U * step) + threadIdx.x * V;

  Vector<T, V> values[U];
  if constexpr (kReads) {
    const T* in = static_cast<const T*>(problem.in.data) + problem.in.strides.row(batch, head, query);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (first + u * step < visible) {  // hidden scores are not read
        values[u] = load_strided<V>(in, first + u * step, problem.in.strides.key);
      }
    }
  }
  Real slope = 0;
  if constexpr (Policy::kPass != AlibiPass::mask) {
    slope = problem.slopes.slope<Real>(head);
  }
  const T hidden = narrow<T>(Policy::kPass == AlibiPass::mask ? Real(0) : static_cast<Real>(-INFINITY));
  T* out = static_cast<T*>(problem.out.data) + problem.out.strides.row(batch, head, query);
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const uint32_t key = first + u * step;
    if (key < k_len) {
      Vector<T, V> result;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if constexpr (Policy::kPass == AlibiPass::mask) {
          result[i] = values[u][i];
        } else {
          Real sum = bias_of(slope, position, key + i);
          if constexpr (kReads) {
            sum = widen(values[u][i]) + sum;
          }
          result[i] = narrow<T>(sum);
        }
        if (Policy::kCausal && key + i >= visible) {
          result[i] = hidden;
        }
      }
      store_strided<V>(out, key, problem.out.strides.key, result);
    }
  }
}

}  // namespace posenc::cuda
