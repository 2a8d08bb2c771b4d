#include <ops/rotary_embedding_backward.h>

#include <torch/library.h>

namespace posenc {

// What a core reads and writes is in its cache for the second operator, token by token or not: one pass would save
// nothing that the sums in float64 do not hide.
TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_embedding_backward", rotary_embedding_backward_in_two);
}

}  // namespace posenc
