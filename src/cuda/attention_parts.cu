#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>
#include <cuda/attention_parts_kernel.cuh>

#include <algorithm>

// Launches of the kernels that compute results of attention from those over parts of the keys.
namespace posenc::cuda {
namespace {

/// Channels of a thread: four of float32 are 16 bytes.
constexpr int kChannels = 4;

template <typename T>
bool holds_vectors(const void* data, const HeadStrides& strides) {
  return is_aligned(data, kChannels * sizeof(T)) && strides.batch % kChannels == 0 && strides.token % kChannels == 0 &&
      strides.head % kChannels == 0;
}

template <typename Problem>
void launch(void (*kernel)(Problem), const Problem& p, int64_t channels) {
  const int64_t along_channels = std::min<int64_t>(ceil_div(p.head_dim, channels), kMaxThreads);
  const int64_t along_rows = kMaxThreads / along_channels;
  const dim3 block(along_channels, along_rows);
  const dim3 grid(ceil_div(p.rows, along_rows), p.heads, p.batch);
  kernel<<<grid, block, 0, current_stream()>>>(p);
  check_launch();
}

template <typename First, typename T, typename Out>
void launch_merge(const MergePartsProblem& p) {
  if (p.head_dim % kChannels == 0 && holds_vectors<First>(p.first.out, p.first.out_strides) &&
      holds_vectors<T>(p.second.out, p.second.out_strides) && holds_vectors<Out>(p.out, p.out_strides)) {
    launch(merge_parts_kernel<First, T, Out, kChannels>, p, kChannels);
  } else {
    launch(merge_parts_kernel<First, T, Out, 1>, p, 1);
  }
}

template <typename T, typename Out>
void launch_sum(const SumPartsProblem& p) {
  bool vectors = p.head_dim % kChannels == 0 && holds_vectors<Out>(p.out, p.out_strides);
  for (int i = 0; i < p.count; ++i) {
    const SumTerm& term = p.terms[i];
    vectors = vectors &&
        (term.wide ? holds_vectors<arithmetic_t<T>>(term.data, term.strides)
                   : holds_vectors<T>(term.data, term.strides));
  }
  if (vectors) {
    launch(sum_parts_kernel<T, Out, kChannels>, p, kChannels);
  } else {
    launch(sum_parts_kernel<T, Out, 1>, p, 1);
  }
}

}  // namespace

void merge_parts(const MergePartsProblem& problem, DType first, DType second, DType out) {
  for_dtype(second, [&](auto type) {
    using T = typename decltype(type)::type;
    for_bool(first == second, [&](auto same) {
      using First = std::conditional_t<decltype(same)::value, T, arithmetic_t<T>>;
      for_bool(out == second, [&](auto narrow_out) {
        using Out = std::conditional_t<decltype(narrow_out)::value, T, arithmetic_t<T>>;
        launch_merge<First, T, Out>(problem);
      });
    });
  });
}

void sum_parts(const SumPartsProblem& problem, DType terms, DType out) {
  for_dtype(terms, [&](auto type) {
    using T = typename decltype(type)::type;
    for_bool(terms == out, [&](auto same) {
      launch_sum<T, std::conditional_t<decltype(same)::value, T, arithmetic_t<T>>>(problem);
    });
  });
}

}  // namespace posenc::cuda
