#include <arguments/tensor.h>
#include <ops/alibi_softmax.h>
#include <ops/dispatch.h>
#include <posenc/alibi.h>

#include <torch/library.h>

#include <utility>

namespace posenc {

using arguments::check_defined;
using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "alibi_softmax(Tensor scores, Tensor slopes, *, float scale=1.0, bool causal=False, "
      "Tensor? key_padding_mask=None, SymInt? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "alibi_softmax_backward(Tensor grad, Tensor probs, *, float scale=1.0, bool causal=False, "
      "SymInt? query_offset=None, bool slopes_grad=True) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

Tensor alibi_softmax_symint(
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<c10::SymInt> query_offset) {
  static const auto op = find_operator<decltype(alibi_softmax_symint)>("posenc::alibi_softmax");
  return op.call(scores, slopes, scale, causal, key_padding_mask, std::move(query_offset));
}

Tensor alibi_softmax(
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_softmax", "scores", scores);
  return alibi_softmax_symint(scores, slopes, scale, causal, key_padding_mask, query_offset);
}

std::tuple<Tensor, Tensor> alibi_softmax_backward(
    const Tensor& grad,
    const Tensor& probs,
    double scale,
    bool causal,
    std::optional<c10::SymInt> query_offset,
    bool slopes_grad) {
  static const auto op = find_operator<decltype(alibi_softmax_backward)>("posenc::alibi_softmax_backward");
  return op.call(grad, probs, scale, causal, std::move(query_offset), slopes_grad);
}

}  // namespace posenc
