#include <arguments/qk_norm_rotary_embedding.h>
#include <meta/detail/symbolic.h>
#include <ops/dispatch.h>

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding_meta(
    const QKNormRotation& rotation,
    const Tensor& q,
    const Tensor& k) {
  if (!meta::any_symbol(q, k, rotation)) {
    arguments::check_qk_norm_rotary("posenc::qk_norm_rotary_embedding", rotation, q, k);
  }
  return {at::empty_like(q), at::empty_like(k)};
}

QKNormRotaryGradients qk_norm_rotary_embedding_backward_meta(
    const QKNormRotaryGradMask& mask,
    const QKNormRotaryGradInputs& inputs,
    const QKNormRotation& rotation) {
  if (!meta::any_symbol(inputs, rotation)) {
    arguments::check_qk_norm_rotary_backward(rotation, inputs);
  }
  return arguments::allocate_qk_norm_rotary_gradients(mask, inputs, rotation);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("qk_norm_rotary_embedding", kernel<qk_norm_rotary_embedding_meta>);
  m.impl("qk_norm_rotary_embedding_backward", kernel<qk_norm_rotary_embedding_backward_meta>);
}

}  // namespace posenc
