#include <contract/rotary_embedding_qkv.h>
#include <cuda/detail/rotate.h>

#include <torch/library.h>

namespace posenc {

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("rotary_embedding_qkv", contract::rotary_embedding_qkv<cuda::rotate>);
  m.impl("rotary_embedding_pack", contract::rotary_embedding_pack<cuda::rotate>);
}

}  // namespace posenc
