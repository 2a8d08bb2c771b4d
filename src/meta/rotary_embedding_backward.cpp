#include <ops/rotary_embedding_backward.h>

#include <torch/library.h>

namespace posenc {

// Checks and shapes are those of the two operators.
TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_embedding_backward", rotary_embedding_backward_in_two);
}

}  // namespace posenc
