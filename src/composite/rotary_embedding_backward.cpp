#include <ops/dispatch.h>
#include <ops/rotary_embedding.h>

#include <torch/library.h>

#include <utility>

namespace posenc {

using at::Tensor;

std::tuple<std::vector<Tensor>, Tensor, Tensor> rotary_embedding_backward_by_parts(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  // Called first because it checks the lengths of both lists.
  auto [grad_cos, grad_sin] = dispatch::rotary_embedding_tables_backward(rotation, grads, inputs);
  std::vector<Tensor> input_grads(grads.size());
  if (grads.size() == 2) {
    std::tie(input_grads[0], input_grads[1]) = dispatch::rotary_embedding_qk(rotation.inverse(), grads[0], grads[1]);
  } else {
    input_grads[0] = dispatch::rotary_embedding(rotation.inverse(), grads[0]);
  }
  return {std::move(input_grads), std::move(grad_cos), std::move(grad_sin)};
}

// For Meta and for the CPU, where the float64 sums of the table gradients take longer than the memory accesses.
TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  m.impl("rotary_embedding_backward", kernel<rotary_embedding_backward_by_parts>);
}

}  // namespace posenc
