#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>
#include <cuda/attention_parts_kernel.cuh>

#include <algorithm>

// Launches of the kernel that merges results of attention over parts of the keys.
namespace posenc::cuda {
namespace {

template <typename T, int V>
bool holds_vectors(const AttentionPartRows& part) {
  const HeadStrides& strides = part.out_strides;
  return is_aligned(part.out, V * sizeof(T)) && strides.batch % V == 0 && strides.token % V == 0 &&
      strides.head % V == 0;
}

template <typename First, typename T, int V>
void launch(const AttentionPartsProblem& p) {
  const int64_t along_channels = std::min<int64_t>(ceil_div(p.head_dim, V), kMaxThreads);
  const int64_t along_rows = kMaxThreads / along_channels;
  const dim3 block(along_channels, along_rows);
  const dim3 grid(ceil_div(p.rows, along_rows), p.heads, p.batch);
  attention_parts_kernel<First, T, V><<<grid, block, 0, current_stream()>>>(p);
  check_launch();
}

/// Each thread processes four channels, of which the result has 16 bytes in float32, or one.
template <typename First, typename T>
void launch_vectors(const AttentionPartsProblem& p) {
  constexpr int V = 4;
  // A vector of four float64 takes two loads of 16 bytes.
  if (p.head_dim % V == 0 && holds_vectors<First, V>(p.first) && holds_vectors<T, V>(p.second)) {
    launch<First, T, V>(p);
  } else {
    launch<First, T, 1>(p);
  }
}

}  // namespace

void attention_parts(const AttentionPartsProblem& problem, DType first, DType second) {
  for_dtype(second, [&](auto type) {
    using T = typename decltype(type)::type;
    if (first == second) {
      launch_vectors<T, T>(problem);
    } else {
      launch_vectors<arithmetic_t<T>, T>(problem);
    }
  });
}

}  // namespace posenc::cuda
