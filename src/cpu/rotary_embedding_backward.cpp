#include <ops/rotary_embedding_backward.h>

#include <torch/library.h>

namespace posenc {

// Two operators one after the other: the sums in float64, not the memory, bound the second.
TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_embedding_backward", rotary_embedding_backward_in_two);
}

}  // namespace posenc
