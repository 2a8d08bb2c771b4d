#pragma once

#include <contract/rotary_problem.h>

namespace posenc {

/// One call of `rotary_embedding_backward`, or of `rotary_embedding_tables_backward`, which has no use for `rotation`.
struct RotaryBackwardProblem {
  RotaryTablesProblem tables;
  RotaryProblem rotation;  // of the gradients, backwards
};

}  // namespace posenc
