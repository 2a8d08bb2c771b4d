#include <cuda/detail/dispatch.h>
#include <cuda/detail/vector_width.h>
#include <cuda/kernels.h>
#include <cuda/rotary_embedding_backward_kernel.cuh>

#include <algorithm>
#include <mutex>

// Gradients of the tables, with or without the gradients of the inputs.
namespace posenc::cuda {
namespace {

/// Whether all tensors of a call can be read and written in vectors of V elements.
template <typename T, int V, bool Interleaved, bool Splat, bool WritesInputGrads>
bool backward_allows(const RotaryBackwardProblem& problem) {
  constexpr int kEntries = Interleaved ? V / 2 : V;
  bool allowed = !WritesInputGrads ||
      (table_loads_vectors<arithmetic_t<T>, kEntries>(problem.rotation.cos) &&
       table_loads_vectors<arithmetic_t<T>, kEntries>(problem.rotation.sin));
  for (int i = 0; i < problem.tables.num_operands; ++i) {
    const RotaryTablesProblem::Operand& from = problem.tables.operands[i];
    const RotaryProblem::Operand& to = problem.rotation.operands[i];
    allowed = allowed && (Splat ? from.grad_strides.channel == 0 : holds_vectors<T, V>(from.grad, from.grad_strides)) &&
        holds_vectors<T, V>(from.input, from.input_strides) &&
        (!WritesInputGrads || holds_vectors<T, V>(to.out, to.out_strides));
  }
  return allowed;
}

/// Whether all pairs of a chunk read the same axis of the positions.
template <typename Policy>
bool chunks_have_one_axis(const RotaryTablesProblem& tables) {
  if (tables.num_axes <= 1) {
    return true;
  }
  const auto num_pairs = static_cast<int>(tables.num_pairs);
  const auto axis = [&](int chunk, int i) { return tables.pair_axes.axis(pair_of_chunk<Policy>(chunk, i, num_pairs)); };
  for (int chunk = 0; chunk < num_pairs / Policy::kVectorWidth; ++chunk) {
    for (int i = 1; i < Policy::kVectorWidth; ++i) {
      if (axis(chunk, i) != axis(chunk, 0)) {
        return false;
      }
    }
  }
  return true;
}

template <typename T, typename Policy>
void launch_rotary_backward(const char* op, const RotaryBackwardProblem& problem) {
  constexpr int V = Policy::kVectorWidth;
  const RotaryTablesProblem& tables = problem.tables;
  const int64_t num_chunks = Policy::kWritesInputGrads
      ? cuda::num_chunks(V, tables.num_pairs, problem.rotation.head_dim)
      : tables.num_pairs / V;
  const int64_t num_heads = tables.operands[0].num_heads + tables.operands[1].num_heads;
  const int64_t chunks = std::min<int64_t>(num_chunks, kMaxThreads);
  // The number of threads along the items that leaves none of them idle if every row has the same number of items.
  const int64_t items = std::max<int64_t>(1, tables.tokens_per_row) * num_heads;
  const int64_t rounds = ceil_div(items, kMaxThreads / chunks * kItemsInFlight);
  const int64_t lanes = ceil_div(items, rounds * kItemsInFlight);
  const bool may_stray = Policy::kWritesInputGrads && tables.order != nullptr;
  const int64_t blocks = tables.table_rows + (may_stray ? kStrayBlocks : 0);
  const int64_t chunk_groups = ceil_div(num_chunks, chunks);
  check(
      blocks <= kMaxGridX && tables.tokens <= kMaxGridX && chunk_groups <= kMaxGridY, "posenc::", op,
      ": expected at most ", kMaxGridX, " rows of the tables, as many tokens, and ", kMaxGridY, " blocks of ", chunks,
      " chunks on CUDA, got ", tables.table_rows, ", ", tables.tokens, " and ", chunk_groups);
  log_debug(
      op, ": ", Policy::kInterleaved ? "interleaved" : "half", " pairing, vectors of ", V, " elements of ", sizeof(T),
      " bytes", Policy::kSplat ? ", one for all channels" : "", ", blocks of ", chunks, " chunks and ", lanes,
      " items");
  const auto divider = [](int64_t divisor) {
    return cuda::Divider(static_cast<uint32_t>(std::max<int64_t>(1, divisor)));
  };
  const RotaryBackwardGrid grid{
      divider(tables.seq_len), divider(num_heads), divider(problem.rotation.table_rows),
      static_cast<int32_t>(num_chunks)};
  rotary_embedding_backward_kernel<T, Policy>
      <<<dim3(blocks, chunk_groups), dim3(chunks, lanes), 0, current_stream()>>>(problem, grid);
  check_launch();
}

/// Launches with 16-byte vectors or with single elements. Tables that require a gradient are too rare for kernels of
/// other widths.
template <bool WritesInputGrads>
void run_rotary_backward(const char* op, const RotaryBackwardProblem& problem, DType dtype) {
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_bool(problem.tables.interleaved, [&](auto is_interleaved) {
      constexpr int V = kMaxVectorBytes / sizeof(T);
      constexpr bool kInterleaved = decltype(is_interleaved)::value;
      const int64_t tail = WritesInputGrads ? problem.rotation.head_dim - 2 * problem.tables.num_pairs : 0;
      const bool in_chunks = problem.tables.num_pairs % V == 0 && tail % V == 0 &&
          chunks_have_one_axis<RotaryBackwardPolicy<V, kInterleaved, false, WritesInputGrads>>(problem.tables);
      if (in_chunks && backward_allows<T, V, kInterleaved, false, WritesInputGrads>(problem)) {
        launch_rotary_backward<T, RotaryBackwardPolicy<V, kInterleaved, false, WritesInputGrads>>(op, problem);
      } else if (in_chunks && backward_allows<T, V, kInterleaved, true, WritesInputGrads>(problem)) {
        launch_rotary_backward<T, RotaryBackwardPolicy<V, kInterleaved, true, WritesInputGrads>>(op, problem);
      } else {
        static std::once_flag once;
        std::call_once(once, [op] {
          log(LogLevel::warning,
              text(
                  op,
                  ": strides, addresses or sizes of the tensors allow only loads of single elements; dense "
                  "channels, 16-byte aligned rows and multiples of 16 bytes in each half of the rotary width are "
                  "fastest"));
        });
        launch_rotary_backward<T, RotaryBackwardPolicy<1, kInterleaved, false, WritesInputGrads>>(op, problem);
      }
    });
  });
}

}  // namespace

void rotary_backward(const char* op, const RotaryBackwardProblem& problem, bool writes_input_grads, DType dtype) {
  for_bool(writes_input_grads, [&](auto writes) { run_rotary_backward<decltype(writes)::value>(op, problem, dtype); });
}

}  // namespace posenc::cuda
