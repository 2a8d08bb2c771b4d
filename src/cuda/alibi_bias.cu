#include <contract/alibi.h>
#include <cuda/detail/alibi_add_launch.cuh>

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

constexpr const char* kOp = "posenc::alibi_bias";

Tensor alibi_bias_cuda(
    const Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<int64_t> query_offset) {
  auto problem = contract::alibi_bias_problem({kOp, causal, query_offset}, slopes, q_len, k_len, dtype);
  const c10::cuda::CUDAGuard device(slopes.device());
  Tensor output = contract::allocate_bias(slopes, dtype, problem);
  cuda::run_alibi_add<cuda::AlibiPass::bias>(kOp, problem, dtype);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_bias", alibi_bias_cuda);
}

}  // namespace posenc
