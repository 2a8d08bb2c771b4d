#include <ops/rotary_embedding_tables_backward.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "rotary_embedding_tables_backward(Tensor[] grads, Tensor[] inputs, Tensor table, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& table,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::rotary_embedding_tables_backward", "")
                             .typed<decltype(rotary_embedding_tables_backward)>();
  return op.call(grads, inputs, table, positions, interleaved, conjugate, pair_axes);
}

}  // namespace posenc
