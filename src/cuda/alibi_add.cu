#include <contract/alibi.h>
#include <cuda/detail/alibi_add_launch.cuh>

#include <torch/library.h>

namespace posenc {
TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_add", contract::alibi_add<cuda::run_alibi_add<cuda::AlibiPass::add>>);
  m.impl("alibi_add_", contract::alibi_add_<cuda::run_alibi_add<cuda::AlibiPass::add>>);
  m.impl("alibi_mask", contract::alibi_mask<cuda::run_alibi_add<cuda::AlibiPass::mask>>);
}

}  // namespace posenc
