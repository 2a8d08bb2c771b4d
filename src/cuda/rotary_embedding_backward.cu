#include <contract/rotary_embedding_backward.h>
#include <cuda/kernels.h>
#include <ops/rotary_embedding_backward.h>
#include <cuda/detail/rotary_backward_launch.cuh>

#include <c10/cuda/CUDAGuard.h>

#include <tuple>
#include <vector>

namespace posenc {

using at::Tensor;

std::tuple<std::vector<Tensor>, Tensor, Tensor> cuda::rotary_embedding_backward(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  if (!pair_axes.empty()) {  // a token has a row for each axis, and no block all of its pairs
    return rotary_embedding_backward_in_two(grads, inputs, cos, sin, positions, interleaved, conjugate, pair_axes);
  }
  auto call = contract::rotary_backward_call({grads, inputs, cos, sin, positions, interleaved, conjugate});
  const c10::cuda::CUDAGuard device(cos.device());
  cuda::run_rotary_backward</*WritesInputGrads=*/true>(
      "posenc::rotary_embedding_backward", call.problem, call.tables, grads[0].scalar_type());
  return {std::move(call.input_grads), call.tables.grad_cos, call.tables.grad_sin};
}

}  // namespace posenc
