#include <contract/rotary_embedding_tables_backward.h>
#include <cuda/kernels.h>
#include <cuda/detail/rotary_backward_launch.cuh>

#include <c10/cuda/CUDAGuard.h>

#include <optional>
#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

constexpr const char* kOp = "posenc::rotary_embedding_tables_backward";

}  // namespace

std::tuple<Tensor, Tensor> cuda::rotary_embedding_tables_backward(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& table,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const auto call =
      contract::rotary_tables_call({kOp, grads, inputs, table, positions, interleaved, conjugate, pair_axes});
  RotaryBackwardProblem problem{call.problem, {}};
  problem.rotation.num_pairs = call.problem.num_pairs;
  const c10::cuda::CUDAGuard device(table.device());
  cuda::run_rotary_backward</*WritesInputGrads=*/false>(kOp, problem, call, inputs[0].scalar_type());
  return {call.grad_cos, call.grad_sin};
}

}  // namespace posenc
