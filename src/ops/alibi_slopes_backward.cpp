#include <ops/alibi_slopes_backward.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <utility>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "alibi_slopes_backward(Tensor grad, *, bool causal=False, SymInt? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

Tensor alibi_slopes_backward(const Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::alibi_slopes_backward", "")
                             .typed<decltype(alibi_slopes_backward)>();
  return op.call(grad, causal, std::move(query_offset));
}

}  // namespace posenc
