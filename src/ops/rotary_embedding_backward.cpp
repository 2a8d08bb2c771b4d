#include <ops/rotary_embedding_backward.h>

#include <ops/rotary_embedding_tables_backward.h>
#include <posenc/rotary_embedding.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "rotary_embedding_backward(Tensor[] grads, Tensor[] inputs, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> (Tensor[], Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> rotary_embedding_backward(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::rotary_embedding_backward", "")
                             .typed<decltype(rotary_embedding_backward)>();
  return op.call(grads, inputs, cos, sin, positions, interleaved, conjugate, pair_axes);
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> rotary_embedding_backward_in_two(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  // First, as it checks the lengths of both lists.
  auto [grad_cos, grad_sin] =
      rotary_embedding_tables_backward(grads, inputs, cos, positions, interleaved, conjugate, pair_axes);
  std::vector<Tensor> input_grads(grads.size());
  if (grads.size() == 2) {
    std::tie(input_grads[0], input_grads[1]) =
        rotary_embedding_qk(grads[0], grads[1], cos, sin, positions, interleaved, !conjugate, pair_axes);
  } else {
    input_grads[0] = rotary_embedding(grads[0], cos, sin, positions, interleaved, !conjugate, pair_axes);
  }
  return {std::move(input_grads), std::move(grad_cos), std::move(grad_sin)};
}

}  // namespace posenc
