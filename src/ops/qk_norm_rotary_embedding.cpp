#include <ops/qk_norm_rotary_embedding.h>

#include <posenc/qk_norm_rotary_embedding.h>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  define(
      m,
      "qk_norm_rotary_embedding(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
      "Tensor? positions=None, *, float eps=1e-6, bool unit_offset=False, bool interleaved=False, "
      "bool conjugate=False, int[] pair_axes=[]) -> (Tensor, Tensor)");
  define(
      m,
      "qk_norm_rotary_embedding_backward(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor k, Tensor q_weight, "
      "Tensor k_weight, Tensor cos, Tensor sin, Tensor? positions=None, *, float eps=1e-6, bool unit_offset=False, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[], bool weights_grad=True) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
}

std::tuple<Tensor, Tensor> qk_norm_rotary_embedding(
    const Tensor& q,
    const Tensor& k,
    const Tensor& q_weight,
    const Tensor& k_weight,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    double eps,
    bool unit_offset,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  return dispatch::qk_norm_rotary_embedding(
      {q_weight, k_weight, cos, sin, positions, eps, unit_offset, interleaved, conjugate, pair_axes}, q, k);
}

}  // namespace posenc
