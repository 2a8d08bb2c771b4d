#include <posenc/rotary_embedding.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "rotary_embedding(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rotary_embedding_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  // They return nothing: functionalisation (torch.compile) takes no operator that returns what it changed.
  m.def(
      "rotary_embedding_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rotary_embedding_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> ()",
      {at::Tag::pt2_compliant_tag});
}

Tensor rotary_embedding(
    const Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::rotary_embedding", "")
                             .typed<decltype(rotary_embedding)>();
  return op.call(x, cos, sin, positions, interleaved, conjugate, pair_axes);
}

std::tuple<Tensor, Tensor> rotary_embedding_qk(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::rotary_embedding_qk", "")
                             .typed<decltype(rotary_embedding_qk)>();
  return op.call(q, k, cos, sin, positions, interleaved, conjugate, pair_axes);
}

Tensor& rotary_embedding_(
    Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  using Signature =
      void(Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool, bool, at::IntArrayRef);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("posenc::rotary_embedding_", "").typed<Signature>();
  op.call(x, cos, sin, positions, interleaved, conjugate, pair_axes);
  return x;
}

std::tuple<Tensor&, Tensor&> rotary_embedding_qk_(
    Tensor& q,
    Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  using Signature =
      void(Tensor&, Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, bool, bool, at::IntArrayRef);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("posenc::rotary_embedding_qk_", "").typed<Signature>();
  op.call(q, k, cos, sin, positions, interleaved, conjugate, pair_axes);
  return {q, k};
}

}  // namespace posenc
