#include <arguments/tensor.h>
#include <ops/alibi_softmax.h>
#include <posenc/alibi.h>

namespace posenc {

using arguments::check_defined;
using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  define(
      m,
      "alibi_softmax(Tensor scores, Tensor slopes, *, float scale=1.0, bool causal=False, "
      "Tensor? key_padding_mask=None, SymInt? query_offset=None) -> Tensor");
  define(
      m,
      "alibi_softmax_backward(Tensor grad, Tensor probs, *, float scale=1.0, bool causal=False, "
      "SymInt? query_offset=None, bool slopes_grad=True) -> (Tensor, Tensor)");
}

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
