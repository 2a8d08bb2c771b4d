#include <contract/rotary_embedding_qkv.h>
#include <cpu/detail/rotate.h>

#include <torch/library.h>

namespace posenc {

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_embedding_qkv", contract::rotary_embedding_qkv<cpu::rotate>);
  m.impl("rotary_embedding_pack", contract::rotary_embedding_pack<cpu::rotate>);
}

}  // namespace posenc
