#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>
#include <cuda/rotary_embedding_kernel.cuh>

#include <mutex>

namespace posenc {
namespace {

/// Whether all tensors of a call can be read and written in vectors of V elements.
template <typename T, int V, bool Interleaved, bool Splat>
bool allows(const RotaryProblem& problem) {
  using Real = cuda::arithmetic_t<T>;
  constexpr int kEntries = Interleaved ? V / 2 : V;
  bool allowed =
      cuda::table_loads_vectors<Real, kEntries>(problem.cos) && cuda::table_loads_vectors<Real, kEntries>(problem.sin);
  for (int i = 0; i < problem.num_operands; ++i) {
    const RotaryProblem::Operand& operand = problem.operands[i];
    allowed = allowed &&
        (Splat ? operand.in_strides.channel == 0 : cuda::holds_vectors<T, V>(operand.in, operand.in_strides)) &&
        cuda::holds_vectors<T, V>(operand.out, operand.out_strides);
  }
  return allowed;
}

bool has_tail(const RotaryProblem& problem) {
  return 2 * problem.num_pairs < problem.head_dim;
}

/// Whether some chunks are copied and not rotated: those of a tail or of v.
bool has_copies(const RotaryProblem& problem) {
  return has_tail(problem) || problem.num_operands == 3;
}

/// Whether some vector of V elements has pairs of different axes.
template <int V, bool Interleaved>
bool mixes_axes(const RotaryProblem& problem) {
  constexpr int64_t kPairs = Interleaved && V > 1 ? V / 2 : V;
  for (int64_t pair = 0; pair < problem.num_pairs; ++pair) {
    if (problem.pair_axes.axis(pair) != problem.pair_axes.axis(pair - pair % kPairs)) {
      return true;
    }
  }
  return false;
}

template <typename T, typename Policy>
void launch(const RotaryProblem& problem) {
  const Strides& strides = problem.operands[0].out_strides;
  const bool tokens_first = strides.seq < strides.head;
  const int64_t max_threads = has_tail(problem) ? cuda::kMaxThreadsWithTail : cuda::kMaxThreads;
  const int64_t num_chunks = cuda::num_chunks(Policy::kVectorWidth, problem.num_pairs, problem.head_dim);
  const int64_t num_heads = problem.num_heads();
  const int64_t num_tokens = problem.batch * problem.seq_len;
  const auto [chunks, heads, tokens] =
      cuda::block_shape(max_threads, num_chunks, cuda::ceil_div(num_heads, Policy::kHeads), num_tokens, tokens_first);
  const int64_t head_groups = cuda::ceil_div(num_heads, heads * Policy::kHeads);
  const int64_t token_groups = cuda::ceil_div(num_tokens, tokens);
  const int64_t chunk_groups = cuda::ceil_div(num_chunks, chunks);
  // The token index, padded to whole blocks, must stay below 2^31, which `Divider::quotient` requires.
  cuda::check(
      token_groups * tokens <= cuda::kMaxGridX && token_groups * head_groups <= cuda::kMaxGridX &&
          chunk_groups <= cuda::kMaxGridY,
      "posenc::rotary_embedding: expected at most ", cuda::kMaxGridX, " tokens, as many blocks of ", tokens,
      " tokens and ", heads, " heads, and ", cuda::kMaxGridY, " blocks of ", chunks, " chunks on CUDA, got ",
      num_tokens, ", ", token_groups * head_groups, " and ", chunk_groups);
  cuda::log_debug(
      "rotary_embedding: ", problem.interleaved ? "interleaved" : "half", " pairing, vectors of ", Policy::kVectorWidth,
      " elements of ", sizeof(T), " bytes", Policy::kSplat ? ", one for all channels" : "",
      Policy::kAxes ? ", positions of several axes" : "", ", blocks of ", chunks, " chunks, ", heads, " heads and ",
      tokens, " tokens");
  const cuda::RotaryGrid grid{
      cuda::Divider(static_cast<uint32_t>(tokens_first ? token_groups : head_groups)),
      cuda::Divider(static_cast<uint32_t>(problem.seq_len)), static_cast<int32_t>(num_chunks), tokens_first};
  const dim3 blocks(token_groups * head_groups, chunk_groups);
  const dim3 threads(chunks, heads, tokens);
  cuda::rotary_embedding_kernel<T, Policy><<<blocks, threads, 0, cuda::current_stream()>>>(problem, grid);
  cuda::check_launch();
}

void warn_of_narrow_vectors() {
  static std::once_flag once;
  std::call_once(once, [] {
    log(LogLevel::warning,
        "rotary_embedding: strides or addresses of the tensors or tables allow only loads of less than "
        "16 bytes; dense channels, 16-byte aligned rows and widths that divide into them are fastest");
  });
}

/// Launches with vectors of V elements, or with the widest narrower ones that the call allows. Separate kernels for
/// expanded inputs and for heads without a tail exist for 16-byte vectors only.
template <typename T, int V, bool Interleaved>
void launch_widest(const RotaryProblem& problem) {
  if constexpr (V == 1) {
    launch<T, cuda::RotaryPolicy<V, Interleaved, false, true>>(problem);
  } else {
    constexpr bool kWidest = V * sizeof(T) == cuda::kMaxVectorBytes;
    const bool copies = has_copies(problem);
    if (!cuda::divides(V, problem.num_pairs, problem.head_dim)) {
      launch_widest<T, V / 2, Interleaved>(problem);
    } else if (allows<T, V, Interleaved, false>(problem)) {
      cuda::for_bool(copies || !kWidest, [&](auto copying) {
        launch<T, cuda::RotaryPolicy<V, Interleaved, false, !kWidest || decltype(copying)::value>>(problem);
      });
    } else if (kWidest && allows<T, V, Interleaved, true>(problem)) {
      cuda::for_bool(copies, [&](auto copying) {
        launch<T, cuda::RotaryPolicy<V, Interleaved, kWidest, !kWidest || decltype(copying)::value>>(problem);
      });
    } else {
      warn_of_narrow_vectors();
      launch_widest<T, V / 2, Interleaved>(problem);
    }
  }
}

/// The same for positions with several axes: with 16-byte vectors or single elements.
template <typename T, bool Interleaved>
void launch_with_axes(const RotaryProblem& problem) {
  constexpr int V = cuda::kMaxVectorBytes / sizeof(T);
  if (cuda::divides(V, problem.num_pairs, problem.head_dim) && allows<T, V, Interleaved, false>(problem)) {
    cuda::for_bool(has_copies(problem), [&](auto copying) {
      cuda::for_bool(mixes_axes<V, Interleaved>(problem), [&](auto mixing) {
        launch<T, cuda::RotaryPolicy<V, Interleaved, false, decltype(copying)::value, true, decltype(mixing)::value>>(
            problem);
      });
    });
  } else {
    warn_of_narrow_vectors();
    launch<T, cuda::RotaryPolicy<1, Interleaved, false, true, true>>(problem);
  }
}

}  // namespace

void cuda::rotate(const RotaryProblem& problem, DType dtype) {
  if (problem.batch * problem.seq_len * problem.num_heads() == 0) {
    return;
  }
  cuda::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cuda::for_bool(problem.interleaved, [&](auto interleaved) {
      if (problem.positions.num_axes > 0) {
        launch_with_axes<T, decltype(interleaved)::value>(problem);
      } else {
        launch_widest<T, cuda::kMaxVectorBytes / sizeof(T), decltype(interleaved)::value>(problem);
      }
    });
  });
}

}  // namespace posenc
