#include <autograd/detail/record.h>
#include <ops/rotary_embedding_backward.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;

/// Where the gradients are themselves differentiated, in either mode, they are those of two operators that can be.
std::tuple<std::vector<Tensor>, Tensor, Tensor> rotary_embedding_backward_autograd(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  std::vector<std::reference_wrapper<const Tensor>> differentiable(grads.begin(), grads.end());
  differentiable.insert(differentiable.end(), inputs.begin(), inputs.end());
  differentiable.insert(differentiable.end(), {cos, sin});
  const bool has_tangent = std::any_of(differentiable.begin(), differentiable.end(), [](const Tensor& tensor) {
    return torch::autograd::isFwGradDefined(tensor);
  });
  if (has_tangent || autograd::any_requires_grad(differentiable)) {
    return rotary_embedding_backward_in_two(grads, inputs, cos, sin, positions, interleaved, conjugate, pair_axes);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return rotary_embedding_backward(grads, inputs, cos, sin, positions, interleaved, conjugate, pair_axes);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding_backward", rotary_embedding_backward_autograd);
}

}  // namespace posenc
