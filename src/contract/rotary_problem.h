#pragma once

// What a rotary kernel is given: pointers, extents and strides, checked beforehand. No torch in here, so that
// the CPU and the CUDA kernels can share it.

#include <contract/host_device.h>

#include <cstdint>

namespace posenc {

/// Strides in elements of a tensor read as `[B, S, H, D]`. Packed tensors `[T, H, D]` are B = 1, S = T.
struct Strides {
  int64_t batch, seq, head, channel;
};

/// `cos` or `sin`: row (b, s) of a table given per token, row `position` of one that is looked up.
struct RotaryTable {
  const void* data;
  int64_t stride_batch, stride_row, stride_pair;
};

/// Positions `[B, S]`; `data` is null where there are none.
struct PositionsView {
  const void* data;
  int64_t stride_batch, stride_seq;
  bool is_int64;
};

/// One call of `rotary_embedding` or `rotary_embedding_qk`.
struct RotaryProblem {
  struct Operand {
    const void* in;
    void* out;
    Strides in_strides, out_strides;
    int64_t num_heads;
  };

  int64_t batch, seq_len, head_dim;
  int64_t num_pairs;   // R / 2
  int64_t table_rows;  // positions outside [0, table_rows) give NaN
  Operand operands[2];
  int32_t num_operands;
  RotaryTable cos, sin;
  PositionsView positions;
  bool interleaved;
  bool conjugate;
};

/// One call of `rotary_embedding_tables_backward`. Row r of the tables was read by `tokens_per_row` tokens
/// r, r + S, r + 2S, ... while r < `rows_read`, or, where positions chose the row, by the tokens
/// `order[row_starts[r]]` to `order[row_starts[r + 1] - 1]`.
struct RotaryTablesProblem {
  struct Operand {
    const void* grad;
    const void* input;
    Strides grad_strides, input_strides;
    int64_t num_heads;
  };

  int64_t batch, seq_len;
  int64_t num_pairs;
  int64_t table_rows;  // of all batches, where the tables are [B, S, R/2]
  Operand operands[2];
  int32_t num_operands;
  int64_t tokens_per_row;
  int64_t rows_read;
  const int64_t* order;
  const int64_t* row_starts;
  void* grad_cos;  // [table_rows, num_pairs], contiguous, as is grad_sin
  void* grad_sin;
  bool interleaved;
  bool conjugate;

  /// Number of tokens that read `row`.
  POSENC_HOST_DEVICE int64_t num_tokens(int64_t row) const {
    if (order != nullptr) {
      return row_starts[row + 1] - row_starts[row];
    }
    return row < rows_read ? tokens_per_row : 0;
  }

  /// The `i`-th of them, as `batch * seq_len + seq`.
  POSENC_HOST_DEVICE int64_t token(int64_t row, int64_t i) const {
    return order != nullptr ? order[row_starts[row] + i] : row + i * seq_len;
  }
};

}  // namespace posenc
