#include <contract/rotary_embedding_tables_backward.h>
#include <cuda/detail/dispatch.h>
#include <cuda/rotary_embedding_tables_backward_kernel.cuh>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_cuda(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& table,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const c10::cuda::CUDAGuard device(table.device());
  const auto call = contract::rotary_tables_call({grads, inputs, table, positions, interleaved, conjugate, pair_axes});
  const RotaryTablesProblem& problem = call.problem;
  const int64_t pair_blocks = cuda::ceil_div(problem.num_pairs, cuda::kPairsPerBlock);
  TORCH_CHECK(
      problem.table_rows <= std::numeric_limits<int32_t>::max() && pair_blocks <= cuda::kMaxGridY,
      "posenc::rotary_embedding_tables_backward: expected at most 2^31 - 1 rows and ",
      cuda::kMaxGridY * cuda::kPairsPerBlock, " pairs on CUDA, got ", problem.table_rows, " and ", problem.num_pairs);
  if (problem.table_rows == 0) {
    return {call.grad_cos, call.grad_sin};
  }
  const dim3 grid(problem.table_rows, pair_blocks);
  const dim3 block(cuda::kPairsPerBlock, cuda::kSummandsPerBlock);
  cuda::for_dtype(inputs[0].scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    cuda::for_bool(problem.interleaved, [&](auto is_interleaved) {
      cuda::rotary_embedding_tables_backward_kernel<T, decltype(is_interleaved)::value>
          <<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(problem);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {call.grad_cos, call.grad_sin};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("rotary_embedding_tables_backward", rotary_embedding_tables_backward_cuda);
}

}  // namespace posenc
