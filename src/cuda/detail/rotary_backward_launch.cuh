#pragma once

#include <contract/rotary_embedding_tables_backward.h>
#include <cuda/detail/dispatch.h>
#include <cuda/detail/vector_width.h>
#include <posenc/logging.h>
#include <cuda/rotary_embedding_backward_kernel.cuh>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <mutex>

// The launch that the gradients of tables and those of tables and inputs have in common.
namespace posenc::cuda {

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

template <typename T, typename Policy>
void launch_rotary_backward(const char* op, const RotaryBackwardProblem& problem) {
  constexpr int V = Policy::kVectorWidth;
  const RotaryTablesProblem& tables = problem.tables;
  const int64_t num_chunks = Policy::kWritesInputGrads
      ? cuda::num_chunks(V, tables.num_pairs, problem.rotation.head_dim)
      : tables.num_pairs / V;
  const int64_t num_heads = tables.operands[0].num_heads + tables.operands[1].num_heads;
  const int64_t chunks = std::min<int64_t>(num_chunks, kMaxThreads);
  // As many threads along the items as leave none of them idle, where every row has as many items.
  const int64_t items = std::max<int64_t>(1, tables.tokens_per_row) * num_heads;
  const int64_t rounds = ceil_div(items, kMaxThreads / chunks * kItemsInFlight);
  const int64_t lanes = ceil_div(items, rounds * kItemsInFlight);
  const bool may_stray = Policy::kWritesInputGrads && tables.order != nullptr;
  const int64_t blocks = tables.table_rows + (may_stray ? kStrayBlocks : 0);
  const int64_t chunk_groups = ceil_div(num_chunks, chunks);
  const int64_t num_tokens = tables.batch * tables.seq_len;
  TORCH_CHECK(
      blocks <= kMaxGridX && num_tokens <= kMaxGridX && chunk_groups <= kMaxGridY, op, ": expected at most ", kMaxGridX,
      " rows of the tables, as many tokens, and ", kMaxGridY, " blocks of ", chunks, " chunks on CUDA, got ",
      tables.table_rows, ", ", num_tokens, " and ", chunk_groups);
  if (log_level() <= LogLevel::debug) {
    log(LogLevel::debug,
        c10::str(
            op + 8, ": ", Policy::kInterleaved ? "interleaved" : "half", " pairing, vectors of ", V, " elements of ",
            sizeof(T), " bytes", Policy::kSplat ? ", one for all channels" : "", ", blocks of ", chunks, " chunks and ",
            lanes, " items"));
  }
  const auto divider = [](int64_t divisor) {
    return cuda::Divider(static_cast<uint32_t>(std::max<int64_t>(1, divisor)));
  };
  const RotaryBackwardGrid grid{
      divider(tables.seq_len), divider(num_heads), divider(problem.rotation.table_rows),
      static_cast<int32_t>(num_chunks)};
  rotary_embedding_backward_kernel<T, Policy>
      <<<dim3(blocks, chunk_groups), dim3(chunks, lanes), 0, c10::cuda::getCurrentCUDAStream()>>>(problem, grid);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

/// Launches with the widest vectors, or with single elements: tables with gradients are rare enough that widths between
/// are not worth kernels of their own.
template <bool WritesInputGrads>
void run_rotary_backward(
    const char* op,
    const RotaryBackwardProblem& problem,
    const contract::RotaryTablesCall& call,
    at::ScalarType dtype) {
  const int64_t num_heads = problem.tables.operands[0].num_heads + problem.tables.operands[1].num_heads;
  if (problem.tables.batch * problem.tables.seq_len * num_heads == 0) {
    call.grad_cos.zero_();
    call.grad_sin.zero_();
    return;
  }
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for_bool(problem.tables.interleaved, [&](auto is_interleaved) {
      constexpr int V = kMaxVectorBytes / sizeof(T);
      constexpr bool kInterleaved = decltype(is_interleaved)::value;
      const int64_t tail = WritesInputGrads ? problem.rotation.head_dim - 2 * problem.tables.num_pairs : 0;
      const bool divides = problem.tables.num_pairs % V == 0 && tail % V == 0;
      if (divides && backward_allows<T, V, kInterleaved, false, WritesInputGrads>(problem)) {
        launch_rotary_backward<T, RotaryBackwardPolicy<V, kInterleaved, false, WritesInputGrads>>(op, problem);
      } else if (divides && backward_allows<T, V, kInterleaved, true, WritesInputGrads>(problem)) {
        launch_rotary_backward<T, RotaryBackwardPolicy<V, kInterleaved, true, WritesInputGrads>>(op, problem);
      } else {
        static std::once_flag once;
        std::call_once(once, [op] {
          log(LogLevel::warning,
              c10::str(
                  op + 8,
                  ": strides, addresses or sizes of the tensors allow only loads of single elements; dense "
                  "channels, 16-byte aligned rows and multiples of 16 bytes in each half of the rotary width are "
                  "fastest"));
        });
        launch_rotary_backward<T, RotaryBackwardPolicy<1, kInterleaved, false, WritesInputGrads>>(op, problem);
      }
    });
  });
}

}  // namespace posenc::cuda
