#pragma once

// Arguments of the kernels of query-key normalisation with rotary embedding, checked beforehand. No torch.

#include <arguments/rotary_problem.h>

#include <cstdint>

namespace posenc {

/// One call of `qk_norm_rotary_embedding`. `rotary` describes inputs, rotation and outputs.
struct QKNormRotaryProblem {
  struct Weight {
    const void* data;
    int64_t stride;
  };

  RotaryProblem rotary;
  Weight weights[2];      // one for each operand
  bool weights_are_wide;  // weights are float32, float64 for float64 operands; else of the dtype of the operands
  bool unit_offset;       // multiply by 1 + w instead of w
  double eps;
};

/// One call of `qk_norm_rotary_embedding_backward`. `rotary` describes the inverse rotation; its operands are the
/// gradients of the outputs (`in`) and of the inputs (`out`).
struct QKNormRotaryBackwardProblem {
  struct Input {
    const void* data;
    Strides strides;
  };

  QKNormRotaryProblem call;
  Input inputs[2];
  void* weight_grads[2];  // `[D]`, contiguous, of the dtype of the weights; null if they are not computed
};

}  // namespace posenc
