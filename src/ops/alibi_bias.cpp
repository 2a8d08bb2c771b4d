#include <ops/alibi_bias.h>

#include <arguments/tensor.h>
#include <ops/dispatch.h>
#include <posenc/alibi.h>

#include <torch/library.h>

namespace posenc {

using arguments::check_defined;
using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "alibi_bias(Tensor slopes, SymInt q_len, SymInt k_len, *, bool causal=False, ScalarType dtype=float, "
      "SymInt? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "alibi_add(Tensor scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // Without a result: torch.compile takes no operator that returns its argument.
  m.def(
      "alibi_add_(Tensor(a!) scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("alibi_mask(Tensor grad, *, SymInt? query_offset=None) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "alibi_slopes_backward(Tensor grad, *, bool causal=False, SymInt? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

namespace dispatch {

Tensor alibi_bias(const AlibiBiasArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_bias>("posenc::alibi_bias", arguments);
}

Tensor alibi_add(const AlibiAddArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_add>("posenc::alibi_add", arguments);
}

void alibi_add_(const AlibiAddArguments<c10::SymInt>& arguments) {
  call_operator<&alibi_add_>("posenc::alibi_add_", arguments);
}

Tensor alibi_mask(const AlibiMaskArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_mask>("posenc::alibi_mask", arguments);
}

Tensor alibi_slopes_backward(const AlibiSlopesBackwardArguments<c10::SymInt>& arguments) {
  return call_operator<&alibi_slopes_backward>("posenc::alibi_slopes_backward", arguments);
}

}  // namespace dispatch

Tensor alibi_bias(
    const Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_bias", "slopes", slopes);
  return dispatch::alibi_bias({slopes, q_len, k_len, causal, dtype, query_offset});
}

Tensor alibi_add(const Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_add", "scores", scores);
  return dispatch::alibi_add({scores, slopes, causal, query_offset});
}

Tensor& alibi_add_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_add_", "scores", scores);
  dispatch::alibi_add_({scores, slopes, causal, query_offset});
  return scores;
}

}  // namespace posenc
