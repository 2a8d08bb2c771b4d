#pragma once

// What a kernel of query-key normalisation with rotary embedding is given, checked beforehand. No torch.

#include <arguments/rotary_problem.h>

#include <cstdint>

namespace posenc {

/// One call of `qk_norm_rotary_embedding`; `rotary` says what is read, rotated and written.
struct QKNormRotaryProblem {
  struct Weight {
    const void* data;
    int64_t stride;
  };

  RotaryProblem rotary;
  Weight weights[2];      // of each operand
  bool weights_are_wide;  // of the dtype of the arithmetic, not of the operands
  bool unit_offset;       // weights are 1 + w
  double eps;
};

/// One call of `qk_norm_rotary_embedding_backward`. `rotary` is the rotation backwards, of the gradient of an output
/// (`in`) on its way to that of an input (`out`).
struct QKNormRotaryBackwardProblem {
  struct Input {
    const void* data;
    Strides strides;
  };

  QKNormRotaryProblem call;
  Input inputs[2];
  void* weight_grads[2];  // `[D]`, contiguous, of the dtype of the weights; null where they are not wanted
};

}  // namespace posenc
