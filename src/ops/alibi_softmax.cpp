#include <arguments/tensor.h>
#include <ops/alibi_softmax.h>
#include <ops/dispatch.h>
#include <posenc/alibi.h>

#include <torch/library.h>

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

namespace dispatch {

Tensor alibi_softmax(const AlibiSoftmaxArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_softmax>("posenc::alibi_softmax", arguments);
}

std::tuple<Tensor, Tensor> alibi_softmax_backward(const AlibiSoftmaxBackwardArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_softmax_backward>("posenc::alibi_softmax_backward", arguments);
}

}  // namespace dispatch

Tensor alibi_softmax(
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_softmax", "scores", scores);
  return dispatch::alibi_softmax({scores, slopes, scale, causal, key_padding_mask, query_offset});
}

}  // namespace posenc
