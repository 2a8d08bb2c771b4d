#pragma once

#include <arguments/rotary_problem.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/rotary_chunk.cuh>

// Gradients of cos and sin, and optionally of the inputs, in one pass: gradients of the outputs and inputs are read
// once, and the gradients of the inputs are written.
//
// A block processes one row of the tables. Its *items* are the heads (all of q, then all of k) of all tokens that read
// the row. Threads along x are the chunks of a head (rotary_chunk.cuh), threads along y share the items. A thread keeps
// its part of the row and of both sums in registers. The sums of a block are added in shared memory in a fixed order,
// without atomics, so the result has the same bits every time. With positions of several axes all pairs of a chunk have
// one axis, and only the gradients of the tables are computed.
namespace posenc::cuda {

/// Items that a thread has in flight, with four loads of a vector each, and blocks that an SM holds at least, which
/// limits registers to 128.
constexpr int kItemsInFlight = 2;
constexpr int kMinBackwardBlocks = 4;

/// Blocks that write NaN for tokens whose position is outside the tables. There should be no such tokens.
constexpr int kStrayBlocks = 32;

/// Constants of a launch. Each removes code, and with it registers, from the kernel.
template <int VectorWidth, bool IsInterleaved, bool IsSplat, bool WritesInputGrads>
struct RotaryBackwardPolicy {
  static constexpr int kVectorWidth = VectorWidth;
  static constexpr bool kInterleaved = IsInterleaved;
  static constexpr bool kSplat = IsSplat;  // gradients of outputs have one value for all channels of a head
  static constexpr bool kWritesInputGrads = WritesInputGrads;
  static constexpr bool kTail = WritesInputGrads;  // else only the rotary width is read
  static constexpr bool kAxes = false;             // a block reads one row of the tables
};

struct RotaryBackwardGrid {
  Divider seq_len;
  Divider num_heads;   // of q and k together
  Divider table_rows;  // of one batch
  int32_t num_chunks;  // of one head
};

/// One head of one token: the gradient of its output, its input, and the gradient of its input.
template <typename T>
struct BackwardPlace {
  const T* grad;
  const T* input;
  T* input_grad;
  int64_t grad_stride, input_stride, input_grad_stride;  // of channels
};

template <bool WritesInputGrads, typename T>
__device__ BackwardPlace<T> place_of_item(
    const RotaryBackwardProblem& problem,
    const RotaryBackwardGrid& grid,
    uint32_t token,
    uint32_t head_of_all) {
  const uint32_t batch = grid.seq_len.quotient(token);
  const uint32_t seq = token - batch * grid.seq_len.divisor;
  const auto q_heads = static_cast<uint32_t>(problem.tables.operands[0].num_heads);
  const bool is_k = head_of_all >= q_heads;
  const uint32_t head = is_k ? head_of_all - q_heads : head_of_all;
  const auto offset = [&](const Strides& strides) {
    return batch * strides.batch + seq * strides.seq + head * strides.head;
  };
  const RotaryTablesProblem::Operand& from = problem.tables.operands[is_k ? 1 : 0];
  BackwardPlace<T> place{
      static_cast<const T*>(from.grad) + offset(from.grad_strides),
      static_cast<const T*>(from.input) + offset(from.input_strides),
      nullptr,
      from.grad_strides.channel,
      from.input_strides.channel,
      0};
  if constexpr (WritesInputGrads) {
    const RotaryProblem::Operand& to = problem.rotation.operands[is_k ? 1 : 0];
    place.input_grad = static_cast<T*>(to.out) + offset(to.out_strides);
    place.input_grad_stride = to.out_strides.channel;
  }
  return place;
}

/// Iterates over the items of a thread, every blockDim.y-th of the block, without a division for each.
struct ItemWalk {
  uint32_t token, head;
  uint32_t num_heads, token_step, head_step;

  __device__ explicit ItemWalk(const Divider& heads) : num_heads(heads.divisor) {
    token = heads.quotient(threadIdx.y);
    head = threadIdx.y - token * num_heads;
    token_step = heads.quotient(blockDim.y);
    head_step = blockDim.y - token_step * num_heads;
  }

  __device__ void advance() {
    token += token_step;
    head += head_step;
    if (head >= num_heads) {
      head -= num_heads;
      ++token;
    }
  }
};

/// Copies the gradients of channels in the tail.
template <typename Policy, typename T>
__device__ void pass_tail(
    const RotaryBackwardProblem& problem,
    const RotaryBackwardGrid& grid,
    const RotaryTablesProblem::Readers& readers,
    const ChunkChannels& channels) {
  const auto num_tokens = static_cast<uint32_t>(readers.count);
  for (ItemWalk item(grid.num_heads); item.token < num_tokens; item.advance()) {
    const auto token = static_cast<uint32_t>(readers.token(item.token));
    const BackwardPlace<T> place = place_of_item<true, T>(problem, grid, token, item.head);
    HeadChunk<T, Policy> grad;
    grad.template load<Policy::kSplat>(place.grad, place.grad_stride, channels);
    grad.store(place.input_grad, place.input_grad_stride, channels);
  }
}

/// Writes NaN for tokens whose position is outside the tables. In `order` they are before the first row and behind the
/// last one.
template <typename Policy, typename T>
__device__ void fill_strays(
    const RotaryBackwardProblem& problem,
    const RotaryBackwardGrid& grid,
    const ChunkChannels& channels) {
  const RotaryTablesProblem& tables = problem.tables;
  const int64_t below = tables.row_starts[0];
  const int64_t above = tables.row_starts[tables.table_rows];
  HeadChunk<T, Policy> nan;
  nan.a = nan.b = splat<Policy::kVectorWidth>(narrow<T>(static_cast<arithmetic_t<T>>(NAN)));
  for (int64_t i = blockIdx.x - tables.table_rows; i < below + tables.tokens - above; i += kStrayBlocks) {
    const auto token = static_cast<uint32_t>(tables.order[i < below ? i : above + i - below]);
    for (uint32_t head = threadIdx.y; head < grid.num_heads.divisor; head += blockDim.y) {
      const BackwardPlace<T> place = place_of_item<true, T>(problem, grid, token, head);
      nan.store(place.input_grad, place.input_grad_stride, channels);
    }
  }
}

template <typename T, typename Policy>
__global__ void __launch_bounds__(kMaxThreads, kMinBackwardBlocks) rotary_embedding_backward_kernel(
    const __grid_constant__ RotaryBackwardProblem problem,
    const __grid_constant__ RotaryBackwardGrid grid) {
  using Real = arithmetic_t<T>;
  constexpr int V = Policy::kVectorWidth;
  constexpr int U = kItemsInFlight;
  __shared__ Real partial[2][kMaxThreads * V];

  const RotaryTablesProblem& tables = problem.tables;
  const int num_pairs = static_cast<int>(tables.num_pairs);
  const int64_t row = blockIdx.x;
  const int chunk = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const ChunkChannels channels = channels_of_chunk<Policy>(problem.rotation, chunk);
  const bool exists = chunk < grid.num_chunks;
  if constexpr (Policy::kWritesInputGrads) {
    if (row >= tables.table_rows) {
      if (exists) {
        fill_strays<Policy, T>(problem, grid, channels);
      }
      return;
    }
  }
  int axis = 0;
  if constexpr (!Policy::kWritesInputGrads) {
    if (exists && tables.num_axes > 1) {
      axis = tables.pair_axes.axis(pair_of_chunk<Policy>(chunk, 0, num_pairs));
    }
  }
  const RotaryTablesProblem::Readers readers = tables.readers(row, axis);
  const auto num_tokens = static_cast<uint32_t>(readers.count);

  Real sum_cos[V] = {};
  Real sum_sin[V] = {};
  if (exists && channels.rotates) {
    // Tables `[B, S, R/2]` have one set of rows for each batch.
    const uint32_t set = grid.table_rows.quotient(blockIdx.x);
    const uint32_t row_of_set = blockIdx.x - set * grid.table_rows.divisor;
    const auto offset = [&](const RotaryTable& table) {
      return set * table.stride_batch + row_of_set * table.stride_row;
    };
    const TableRow<Real> row_of_tables{
        offset(problem.rotation.cos), offset(problem.rotation.sin), problem.rotation.conjugate ? Real(-1) : Real(1)};
    const ChunkTables<T, Policy> entries(
        problem.rotation, row_of_tables, channels, /*exists=*/Policy::kWritesInputGrads);
    const ChunkChannels pairs{channels.first, channels.second, /*rotates=*/true, /*has_second=*/true};
    for (ItemWalk item(grid.num_heads); item.token < num_tokens;) {
      HeadChunk<T, Policy> grads[U];
      HeadChunk<T, Policy> inputs[U];
      T* input_grads[U];
      int64_t strides[U];  // of their channels
      bool has[U];
      // Behind the last item the first one is read again. With a branch the compiler would unpack the vectors, and so
      // wait for them, before it issues the next loads.
#pragma unroll
      for (int u = 0; u < U; ++u) {
        has[u] = item.token < num_tokens;
        const auto token = static_cast<uint32_t>(readers.token(has[u] ? item.token : 0));
        const auto place = place_of_item<Policy::kWritesInputGrads, T>(problem, grid, token, has[u] ? item.head : 0);
        grads[u].template load<Policy::kSplat>(place.grad, place.grad_stride, pairs);
        inputs[u].template load<false>(place.input, place.input_stride, pairs);
        input_grads[u] = place.input_grad;
        strides[u] = place.input_grad_stride;
        item.advance();
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (!has[u]) {
          continue;
        }
#pragma unroll
        for (int p = 0; p < V; ++p) {
          const int i = first_of_pair<Policy>(p);
          const int j = second_of_pair<Policy>(p);
          Real g1 = widen(grads[u][i]);
          Real g2 = widen(grads[u][j]);
          const Real x1 = widen(inputs[u][i]);
          const Real x2 = widen(inputs[u][j]);
          sum_cos[p] += g1 * x1 + g2 * x2;
          sum_sin[p] += g2 * x1 - g1 * x2;
          if constexpr (Policy::kWritesInputGrads) {
            entries.rotate(p, g1, g2);
            grads[u][i] = narrow<T>(g1);
            grads[u][j] = narrow<T>(g2);
          }
        }
        if constexpr (Policy::kWritesInputGrads) {
          grads[u].store(input_grads[u], strides[u], pairs);
        }
      }
    }
  } else if (exists) {
    if constexpr (Policy::kWritesInputGrads) {
      pass_tail<Policy, T>(problem, grid, readers, channels);
    }
  }

  const int num_threads = static_cast<int>(blockDim.x * blockDim.y);
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    partial[0][i * num_threads + thread] = sum_cos[i];
    partial[1][i * num_threads + thread] = sum_sin[i];
  }
  __syncthreads();
  const int chunks = static_cast<int>(blockDim.x);
  for (int entry = thread; entry < 2 * V * chunks; entry += num_threads) {
    const int column = entry / chunks;  // of V for cos, then V for sin
    const int chunk_in_block = entry - column * chunks;
    const int chunk_of_entry = static_cast<int>(blockIdx.y) * chunks + chunk_in_block;
    if (chunk_of_entry >= num_pairs / V) {
      continue;
    }
    const bool of_sin = column >= V;
    const int i = of_sin ? column - V : column;
    const Real* parts = partial[of_sin ? 1 : 0] + i * num_threads + chunk_in_block;
    Real sum = 0;
    for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
      sum += parts[y * chunks];
    }
    void* const result = of_sin ? tables.grad_sin : tables.grad_cos;
    static_cast<Real*>(result)[row * num_pairs + pair_of_chunk<Policy>(chunk_of_entry, i, num_pairs)] =
        of_sin && tables.conjugate ? -sum : sum;
  }
}

}  // namespace posenc::cuda
