#pragma once

// Arguments of the rotary kernels on CPU and CUDA: pointers, sizes and strides, checked beforehand. No torch.

#include <arguments/host_device.h>

#include <cstdint>

namespace posenc {

/// Strides in elements of a tensor read as `[B, S, H, D]`. Packed tensors `[T, H, D]` are B = 1, S = T.
struct Strides {
  int64_t batch, seq, head, channel;
};

/// `cos` or `sin`. Token (b, s) reads row (b, s) of the table, or with positions the row of its position.
struct RotaryTable {
  const void* data;
  int64_t stride_batch, stride_row, stride_pair;
};

/// Positions `[B, S]`, or `[A, B, S]` if `num_axes` is not 0; `data` is null if there are none.
struct PositionsView {
  const void* data;
  int64_t stride_axis, stride_batch, stride_seq;
  int32_t num_axes;
  bool is_int64;
};

/// The largest number of axes that positions may have, and of pairs that choose among them.
constexpr int64_t kMaxAxes = 4;
constexpr int64_t kMaxPairsWithAxes = 512;

/// The axis of the positions that each pair reads, two bits for each pair. It is small enough to be a kernel argument,
/// which kernels read from constant memory. All zeros if positions have one axis.
struct PairAxes {
  static constexpr int64_t kPairsPerWord = 16;

  uint32_t words[kMaxPairsWithAxes / kPairsPerWord];

  POSENC_HOST_DEVICE int32_t axis(int64_t pair) const {
    return static_cast<int32_t>(words[pair / kPairsPerWord] >> (2 * (pair % kPairsPerWord)) & 3U);
  }

  /// The axis of `pair` must be 0 before.
  void set(int64_t pair, int64_t axis) {
    words[pair / kPairsPerWord] |= static_cast<uint32_t>(axis) << (2 * (pair % kPairsPerWord));
  }
};

/// One call of an operator that rotates one tensor, q and k, or q and k and copies v. It is in place if `out` is `in`.
struct RotaryProblem {
  struct Operand {
    const void* in;
    void* out;
    Strides in_strides, out_strides;
    int64_t num_heads;
  };

  int64_t batch, seq_len, head_dim;
  int64_t num_pairs;  // R / 2
  // A position outside [0, table_rows) gives NaN: in all channels of the token, or with axes in the pairs that read it.
  int64_t table_rows;
  static constexpr int32_t kCopied = 2;  // index of v, which is copied and not rotated
  Operand operands[3];
  int32_t num_operands;
  RotaryTable cos, sin;
  PositionsView positions;
  bool interleaved;
  bool conjugate;
  PairAxes pair_axes;

  int64_t num_heads() const { return operands[0].num_heads + operands[1].num_heads + operands[2].num_heads; }
};

/// One call of `rotary_embedding_tables_backward`. Without positions, row r < `rows_read` of the tables is read by the
/// `tokens_per_row` tokens r, r + S, r + 2S, .... With positions it is read by the tokens `order[row_starts[r]]` to
/// `order[row_starts[r + 1] - 1]`. `order` and `row_starts` have one part for each axis of the positions, and a pair
/// uses the part of its axis.
struct RotaryTablesProblem {
  struct Operand {
    const void* grad;
    const void* input;
    Strides grad_strides, input_strides;
    int64_t num_heads;
  };

  int64_t seq_len;
  int64_t num_pairs;
  int64_t table_rows;  // over all batches if the tables are [B, S, R/2]
  Operand operands[2];
  int32_t num_operands;
  int64_t tokens_per_row;
  int64_t rows_read;
  int64_t num_axes;
  const int64_t* order;       // [num_axes, tokens]
  const int64_t* row_starts;  // [num_axes, table_rows + 1]
  void* grad_cos;             // [table_rows, num_pairs], contiguous; so is grad_sin
  void* grad_sin;
  bool interleaved;
  bool conjugate;
  PairAxes pair_axes;
  int64_t tokens;  // over all batches

  /// The tokens that read one row of the tables along one axis.
  struct Readers {
    const int64_t* order;  // null: tokens first, first + step, ...
    int64_t first, step, count;

    /// The `i`-th token, as `batch * seq_len + seq`.
    POSENC_HOST_DEVICE int64_t token(int64_t i) const { return order != nullptr ? order[i] : first + i * step; }
  };

  POSENC_HOST_DEVICE Readers readers(int64_t row, int64_t axis) const {
    if (order == nullptr) {
      return {nullptr, row, seq_len, row < rows_read ? tokens_per_row : 0};
    }
    const int64_t* starts = row_starts + axis * (table_rows + 1) + row;
    return {order + axis * tokens + starts[0], 0, 0, starts[1] - starts[0]};
  }
};

/// One call of `rotary_embedding_backward`, or of `rotary_embedding_tables_backward`, which reads only `num_pairs` of
/// `rotation`.
struct RotaryBackwardProblem {
  RotaryTablesProblem tables;
  RotaryProblem rotation;  // the inverse rotation of the gradients
};

}  // namespace posenc
