#include <autograd/detail/record.h>
#include <contract/rotary_frequencies.h>
#include <meta/detail/symbolic.h>
#include <ops/rotary_tables_backward.h>

#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <torch/library.h>

#include <array>
#include <functional>

namespace posenc {
namespace {

using at::Tensor;

/// Where the gradient is itself differentiated it is made of tensor operations, which know their derivatives: a table
/// is small beside what it rotates.
Tensor rotary_tables_backward_autograd(
    const Tensor& grad_cos,
    const Tensor& grad_sin,
    const Tensor& cos,
    const Tensor& sin,
    at::ScalarType dtype) {
  const std::array<std::reference_wrapper<const Tensor>, 4> differentiable{grad_cos, grad_sin, cos, sin};
  for (const Tensor& tensor : differentiable) {
    autograd::check_no_tangent("posenc::rotary_tables_backward", tensor);
  }
  if (!autograd::any_requires_grad(differentiable)) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rotary_tables_backward(grad_cos, grad_sin, cos, sin, dtype);
  }
  if (!meta::any_symbolic({std::cref(grad_cos), std::cref(grad_sin), std::cref(cos), std::cref(sin)})) {
    contract::check_frequencies_backward({grad_cos, grad_sin, cos, sin, dtype});
  }
  const auto wide = [](const Tensor& tensor) { return tensor.to(at::kDouble); };
  const Tensor positions = at::arange(c10::Scalar(cos.sym_size(0)), cos.options().dtype(at::kDouble)).unsqueeze(1);
  return ((wide(cos) * wide(grad_sin) - wide(sin) * wide(grad_cos)) * positions).sum(0).to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_tables_backward", rotary_tables_backward_autograd);
}

}  // namespace posenc
