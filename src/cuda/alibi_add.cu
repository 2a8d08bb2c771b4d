#include <contract/alibi.h>
#include <cuda/detail/alibi_add_launch.cuh>

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

Tensor alibi_add_cuda(const Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  constexpr const char* kOp = "posenc::alibi_add";
  auto problem = contract::alibi_add_problem({kOp, causal, query_offset}, scores, slopes);
  const c10::cuda::CUDAGuard device(scores.device());
  Tensor output = contract::allocate_output(scores, problem.out);
  cuda::run_alibi_add<cuda::AlibiPass::add>(kOp, problem, scores.scalar_type());
  return output;
}

Tensor& alibi_add_cuda_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  constexpr const char* kOp = "posenc::alibi_add_";
  const auto problem = contract::alibi_add_in_place_problem({kOp, causal, query_offset}, scores, slopes);
  const c10::cuda::CUDAGuard device(scores.device());
  cuda::run_alibi_add<cuda::AlibiPass::add>(kOp, problem, scores.scalar_type());
  return scores;
}

Tensor alibi_mask_cuda(const Tensor& grad, std::optional<int64_t> query_offset) {
  constexpr const char* kOp = "posenc::alibi_mask";
  auto problem = contract::alibi_mask_problem({kOp, /*causal=*/true, query_offset}, grad);
  const c10::cuda::CUDAGuard device(grad.device());
  Tensor output = contract::allocate_output(grad, problem.out);
  cuda::run_alibi_add<cuda::AlibiPass::mask>(kOp, problem, grad.scalar_type());
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_add", alibi_add_cuda);
  m.impl("alibi_add_", alibi_add_cuda_);
  m.impl("alibi_mask", alibi_mask_cuda);
}

}  // namespace posenc
