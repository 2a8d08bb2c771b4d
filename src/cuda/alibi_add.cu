#include <cuda/kernels.h>
#include <cuda/detail/alibi_add_launch.cuh>

namespace posenc {

void cuda::alibi_add(const AlibiAddProblem& problem, const at::Tensor& like) {
  run_alibi_add<AlibiPass::add>(problem, like);
}

void cuda::alibi_mask(const AlibiAddProblem& problem, const at::Tensor& like) {
  run_alibi_add<AlibiPass::mask>(problem, like);
}

}  // namespace posenc
