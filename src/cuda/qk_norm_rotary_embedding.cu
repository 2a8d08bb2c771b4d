#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>
#include <cuda/qk_norm_rotary_embedding_backward_kernel.cuh>
#include <cuda/qk_norm_rotary_embedding_kernel.cuh>

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>

namespace posenc {
namespace {

/// With gradients of weights: heads that a row of lanes processes in turn at least, and blocks at most. A block must
/// process enough heads to amortise its reduction. The number of blocks allows two rounds of six on each of 132 SMs,
/// and keeps the second kernel short (1.18 instead of 1.20 times the copy with 4096 blocks, measured on an H100 with
/// bfloat16, 8192 tokens, 32 and 8 heads of 128).
constexpr int64_t kMinHeadsInTurn = 4;
constexpr int64_t kMaxSumBlocks = 1584;

/// Grid and block of a launch.
struct LaunchPlan {
  cuda::NormGrid grid;
  dim3 blocks, threads;
};

cuda::HeadOrder order_of(const RotaryProblem& problem, const RotaryProblem::Operand& operand) {
  const bool tokens_first = operand.out_strides.seq < operand.out_strides.head;
  const int64_t inner = std::max<int64_t>(1, tokens_first ? problem.seq_len : operand.num_heads);
  const int64_t middle = std::max<int64_t>(1, tokens_first ? operand.num_heads : problem.seq_len);
  return {
      cuda::Divider(static_cast<uint32_t>(inner)), cuda::Divider(static_cast<uint32_t>(middle)),
      static_cast<uint32_t>(problem.batch * problem.seq_len * operand.num_heads), tokens_first};
}

/// See `NormGrid::mix`.
uint32_t mix_of(int64_t blocks_of_first, int64_t num_blocks) {
  const int64_t blocks_of_second = num_blocks - blocks_of_first;
  if (blocks_of_first == 0 || blocks_of_second == 0) {
    return 0;
  }
  return static_cast<uint32_t>(cuda::ceil_div(blocks_of_second << 32, num_blocks));
}

/// @param sums  whether every block computes a sum for each weight.
LaunchPlan plan_launch(const char* op, const RotaryProblem& problem, int vector_width, bool sums) {
  const int64_t num_chunks = cuda::num_chunks(vector_width, problem.num_pairs, problem.head_dim);
  int64_t lanes = 1;
  while (lanes < num_chunks && lanes < cuda::kWarp) {
    lanes *= 2;
  }
  int64_t rows = cuda::kMaxThreads / lanes;
  if (sums) {
    rows = std::min(rows, cuda::kMaxNormSums / problem.head_dim);
  }
  const int64_t num_tokens = problem.batch * problem.seq_len;
  int64_t row_groups[2];
  for (int i = 0; i < 2; ++i) {
    row_groups[i] = cuda::ceil_div(num_tokens * problem.operands[i].num_heads, rows);
  }
  const int64_t all_groups = row_groups[0] + row_groups[1];
  const int64_t in_turn = sums ? std::max(kMinHeadsInTurn, cuda::ceil_div(all_groups, kMaxSumBlocks)) : int64_t{1};
  const int64_t blocks_of_first = cuda::ceil_div(row_groups[0], in_turn);
  const int64_t num_blocks = blocks_of_first + cuda::ceil_div(row_groups[1], in_turn);
  // The head index, padded to whole blocks, must stay below 2^31, which `Divider::quotient` requires.
  cuda::check(
      num_blocks * in_turn * rows <= cuda::kMaxGridX, op, ": expected at most ", cuda::kMaxGridX - 2 * in_turn * rows,
      " heads of all tokens of q and k on CUDA, got ", num_tokens * problem.operands[0].num_heads, " and ",
      num_tokens * problem.operands[1].num_heads);
  cuda::log_debug(
      op, ": ", problem.interleaved ? "interleaved" : "half", " pairing, vectors of ", vector_width, " elements, ",
      num_blocks, " blocks of ", lanes, " lanes for each of ", rows, " heads, ", in_turn, " in turn");
  return {
      {{order_of(problem, problem.operands[0]), order_of(problem, problem.operands[1])},
       static_cast<uint32_t>(blocks_of_first),
       static_cast<int32_t>(num_chunks),
       static_cast<int32_t>(in_turn),
       mix_of(blocks_of_first, num_blocks)},
      dim3(num_blocks),
      dim3(lanes, rows)};
}

template <typename Real>
cuda::NormScalars<Real> scalars_of(const QKNormRotaryProblem& problem) {
  return {static_cast<Real>(problem.eps), static_cast<Real>(1.0 / static_cast<double>(problem.rotary.head_dim))};
}

void check_sizes(const char* op, const RotaryProblem& problem) {
  cuda::check(
      problem.head_dim <= cuda::kMaxNormHeadDim, op, ": expected a head size of at most ", cuda::kMaxNormHeadDim,
      " on CUDA, got ", problem.head_dim);
  cuda::check(
      problem.positions.num_axes == 0 || problem.table_rows <= std::numeric_limits<int32_t>::max(), op,
      ": expected tables of at most 2^31 - 1 rows with pair_axes on CUDA, got ", problem.table_rows);
}

void warn_of_single_elements() {
  static std::once_flag once;
  std::call_once(once, [] {
    log(LogLevel::warning,
        "qk_norm_rotary_embedding: head size, strides or addresses of the tensors, weights or tables allow no vectors "
        "of 16 bytes; dense channels, 16-byte aligned rows and a head size of at most 32 pairs of vectors are fastest");
  });
}

/// Whether a warp can hold a head, and tables, weights and outputs can be accessed in vectors of V elements.
template <typename T, typename W, int V>
bool holds_heads(const QKNormRotaryProblem& problem, bool interleaved) {
  using Real = cuda::arithmetic_t<T>;
  const RotaryProblem& rotary = problem.rotary;
  const auto tables_load = [&](const RotaryTable& table) {
    return interleaved ? cuda::table_loads_vectors<Real, V / 2>(table) : cuda::table_loads_vectors<Real, V>(table);
  };
  bool holds = cuda::divides(V, rotary.num_pairs, rotary.head_dim) &&
      cuda::num_chunks(V, rotary.num_pairs, rotary.head_dim) <= cuda::kWarp && tables_load(rotary.cos) &&
      tables_load(rotary.sin);
  for (int i = 0; i < rotary.num_operands; ++i) {
    const RotaryProblem::Operand& operand = rotary.operands[i];
    holds = holds && cuda::holds_vectors<T, V>(operand.out, operand.out_strides) && problem.weights[i].stride == 1 &&
        cuda::is_aligned(problem.weights[i].data, cuda::kTableVector<W, V> * sizeof(W));
  }
  return holds;
}

/// Calls `body` with the type of the weights.
template <typename T, typename Body>
void for_weight_type(bool wide, Body&& body) {
  if constexpr (std::is_same_v<T, cuda::arithmetic_t<T>>) {
    body(cuda::Type<T>{});
  } else if (wide) {
    body(cuda::Type<cuda::arithmetic_t<T>>{});
  } else {
    body(cuda::Type<T>{});
  }
}

/// See `NormPolicy`.
template <int V>
bool is_whole(const RotaryProblem& problem) {
  const int64_t chunks = cuda::num_chunks(V, problem.num_pairs, problem.head_dim);
  return 2 * problem.num_pairs == problem.head_dim && (chunks & (chunks - 1)) == 0;
}

/// For heads that a warp cannot hold. It accepts all kinds of positions and weights.
template <typename T, bool Interleaved>
using SinglePolicy = cuda::NormPolicy<1, Interleaved, /*IsSplat=*/false, /*HasAxes=*/true, cuda::arithmetic_t<T>>;

template <typename T, typename Policy>
void launch(const QKNormRotaryProblem& problem) {
  const LaunchPlan plan =
      plan_launch("posenc::qk_norm_rotary_embedding", problem.rotary, Policy::kVectorWidth, /*sums=*/false);
  cuda::qk_norm_rotary_embedding_kernel<T, Policy><<<plan.blocks, plan.threads, 0, cuda::current_stream()>>>(
      problem, plan.grid, scalars_of<cuda::arithmetic_t<T>>(problem));
  cuda::check_launch();
}

template <typename T, typename W, bool Interleaved>
void run_typed(const QKNormRotaryProblem& problem) {
  constexpr int V = cuda::kMaxVectorBytes / sizeof(T);
  const RotaryProblem& rotary = problem.rotary;
  bool holds = holds_heads<T, W, V>(problem, Interleaved);
  for (int i = 0; i < rotary.num_operands; ++i) {
    holds = holds && cuda::holds_vectors<T, V>(rotary.operands[i].in, rotary.operands[i].in_strides);
  }
  if (!holds) {
    warn_of_single_elements();
    launch<T, SinglePolicy<T, Interleaved>>(problem);
    return;
  }
  if (rotary.positions.num_axes > 0) {
    launch<T, cuda::NormPolicy<V, Interleaved, false, true, W>>(problem);
  } else {
    cuda::for_bool(is_whole<V>(rotary), [&](auto whole) {
      launch<T, cuda::NormPolicy<V, Interleaved, false, false, W, decltype(whole)::value>>(problem);
    });
  }
}

// --- Backward -------------------------------------------------------------------------------------------------------

constexpr const char* kBackward = "posenc::qk_norm_rotary_embedding_backward";

/// The kernel that a call uses: single elements, vectors, or vectors with one incoming gradient for each head.
enum class Access { single, vectors, one_value };

template <typename T, typename W, int V>
Access access_of(const QKNormRotaryBackwardProblem& problem) {
  const RotaryProblem& rotary = problem.call.rotary;
  if (!holds_heads<T, W, V>(problem.call, rotary.interleaved)) {
    return Access::single;
  }
  bool vectors = true;
  bool one_value = rotary.positions.num_axes == 0;  // there is no kernel for both
  for (int i = 0; i < rotary.num_operands; ++i) {
    const RotaryProblem::Operand& operand = rotary.operands[i];
    const bool input = cuda::holds_vectors<T, V>(problem.inputs[i].data, problem.inputs[i].strides);
    vectors = vectors && input && cuda::holds_vectors<T, V>(operand.in, operand.in_strides);
    one_value = one_value && input && operand.in_strides.channel == 0;
  }
  return vectors ? Access::vectors : one_value ? Access::one_value : Access::single;
}

template <typename T, typename W, typename Policy>
void launch_backward(const QKNormRotaryBackwardProblem& problem) {
  using Real = cuda::arithmetic_t<T>;
  const RotaryProblem& rotary = problem.call.rotary;
  const bool sums = problem.weight_grads[0] != nullptr;
  const cudaStream_t stream = cuda::current_stream();
  const LaunchPlan plan = plan_launch(kBackward, rotary, Policy::kVectorWidth, sums);
  std::shared_ptr<void> memory;
  if (sums) {
    memory = cuda::allocate(plan.blocks.x * rotary.head_dim * static_cast<int64_t>(sizeof(Real)));
  }
  auto* const partial_data = static_cast<Real*>(memory.get());
  if (plan.blocks.x > 0) {
    const size_t shared_bytes = sums ? plan.threads.y * rotary.head_dim * sizeof(Real) : 0;
    cuda::qk_norm_rotary_embedding_backward_kernel<T, Policy><<<plan.blocks, plan.threads, shared_bytes, stream>>>(
        problem, plan.grid, scalars_of<Real>(problem.call), partial_data);
    cuda::check_launch();
  }
  if (sums) {
    const dim3 blocks(cuda::ceil_div(rotary.head_dim, cuda::kSumChannels), rotary.num_operands);
    cuda::qk_norm_weight_gradients_kernel<W, Real><<<blocks, cuda::kSumThreads, 0, stream>>>(
        partial_data, plan.grid.blocks_of_first, plan.blocks.x, static_cast<int32_t>(rotary.head_dim),
        static_cast<W*>(problem.weight_grads[0]), static_cast<W*>(problem.weight_grads[1]));
    cuda::check_launch();
  }
}

template <typename T, typename W, bool Interleaved>
void run_backward_typed(const QKNormRotaryBackwardProblem& problem) {
  constexpr int V = cuda::kMaxVectorBytes / sizeof(T);
  const bool has_axes = problem.call.rotary.positions.num_axes > 0;
  switch (access_of<T, W, V>(problem)) {
    case Access::vectors:
      if (has_axes) {
        return launch_backward<T, W, cuda::NormPolicy<V, Interleaved, false, true, W>>(problem);
      }
      return cuda::for_bool(is_whole<V>(problem.call.rotary), [&](auto whole) {
        launch_backward<T, W, cuda::NormPolicy<V, Interleaved, false, false, W, decltype(whole)::value>>(problem);
      });
    case Access::one_value:
      return launch_backward<T, W, cuda::NormPolicy<V, Interleaved, true, false, W>>(problem);
    case Access::single:
      warn_of_single_elements();
      return launch_backward<T, W, SinglePolicy<T, Interleaved>>(problem);
  }
}

}  // namespace

void cuda::qk_norm_rotate(const QKNormRotaryProblem& problem, DType dtype) {
  const RotaryProblem& rotary = problem.rotary;
  check_sizes("posenc::qk_norm_rotary_embedding", rotary);
  if (rotary.batch * rotary.seq_len * (rotary.operands[0].num_heads + rotary.operands[1].num_heads) == 0) {
    return;
  }
  cuda::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_weight_type<T>(problem.weights_are_wide, [&](auto weight) {
      cuda::for_bool(rotary.interleaved, [&](auto interleaved) {
        run_typed<T, typename decltype(weight)::type, decltype(interleaved)::value>(problem);
      });
    });
  });
}

void cuda::qk_norm_rotate_backward(const QKNormRotaryBackwardProblem& problem, DType dtype) {
  const RotaryProblem& rotary = problem.call.rotary;
  check_sizes(kBackward, rotary);
  const bool empty = rotary.batch * rotary.seq_len * (rotary.operands[0].num_heads + rotary.operands[1].num_heads) == 0;
  if (rotary.num_operands == 0 || (empty && problem.weight_grads[0] == nullptr)) {
    return;
  }
  cuda::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_weight_type<T>(problem.call.weights_are_wide, [&](auto weight) {
      cuda::for_bool(rotary.interleaved, [&](auto interleaved) {
        run_backward_typed<T, typename decltype(weight)::type, decltype(interleaved)::value>(problem);
      });
    });
  });
}

}  // namespace posenc
