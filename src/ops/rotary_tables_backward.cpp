#include <ops/rotary_tables_backward.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "rotary_tables_backward(Tensor grad_cos, Tensor grad_sin, Tensor cos, Tensor sin, *, ScalarType dtype=float) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}

Tensor rotary_tables_backward(
    const Tensor& grad_cos,
    const Tensor& grad_sin,
    const Tensor& cos,
    const Tensor& sin,
    at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::rotary_tables_backward", "")
                             .typed<decltype(rotary_tables_backward)>();
  return op.call(grad_cos, grad_sin, cos, sin, dtype);
}

}  // namespace posenc
