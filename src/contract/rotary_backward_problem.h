#pragma once

#include <contract/rotary_problem.h>

namespace posenc {

/// One call of `rotary_embedding_backward`, or of `rotary_embedding_tables_backward`, which knows no more of the rotation
/// than `num_pairs`.
struct RotaryBackwardProblem {
  RotaryTablesProblem tables;
  RotaryProblem rotation;  // of the gradients, backwards
};

}  // namespace posenc
