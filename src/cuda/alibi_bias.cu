#include <contract/alibi.h>
#include <cuda/detail/alibi_add_launch.cuh>

#include <torch/library.h>

namespace posenc {
TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_bias", contract::alibi_bias<cuda::run_alibi_add<cuda::AlibiPass::bias>>);
}

}  // namespace posenc
