#include <cuda/kernels.h>
#include <cuda/detail/alibi_add_launch.cuh>

namespace posenc {

void cuda::alibi_bias(const AlibiAddProblem& problem, const at::Tensor& like) {
  run_alibi_add<AlibiPass::bias>(problem, like);
}

}  // namespace posenc
