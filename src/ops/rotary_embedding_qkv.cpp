#include <posenc/rotary_embedding.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "rotary_embedding_qkv(Tensor qkv, int num_q_heads, int num_kv_heads, Tensor cos, Tensor sin, "
      "Tensor? positions=None, *, bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rotary_embedding_pack(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool stacked=False, bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<Tensor, Tensor, Tensor> rotary_embedding_qkv(
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::rotary_embedding_qkv", "")
                             .typed<decltype(rotary_embedding_qkv)>();
  return op.call(qkv, num_q_heads, num_kv_heads, cos, sin, positions, interleaved, conjugate, pair_axes);
}

Tensor rotary_embedding_pack(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool stacked,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::rotary_embedding_pack", "")
                             .typed<decltype(rotary_embedding_pack)>();
  return op.call(q, k, v, cos, sin, positions, stacked, interleaved, conjugate, pair_axes);
}

}  // namespace posenc
