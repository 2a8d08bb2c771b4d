#include <ops/alibi_bias.h>

#include <arguments/tensor.h>
#include <ops/dispatch.h>
#include <posenc/alibi.h>

#include <torch/library.h>

#include <utility>

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

Tensor alibi_bias_symint(
    const Tensor& slopes,
    c10::SymInt q_len,
    c10::SymInt k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<c10::SymInt> query_offset) {
  static const auto op = find_operator<decltype(alibi_bias_symint)>("posenc::alibi_bias");
  return op.call(slopes, std::move(q_len), std::move(k_len), causal, dtype, std::move(query_offset));
}

Tensor alibi_bias(
    const Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_bias", "slopes", slopes);
  return alibi_bias_symint(slopes, q_len, k_len, causal, dtype, query_offset);
}

Tensor alibi_add_symint(
    const Tensor& scores,
    const Tensor& slopes,
    bool causal,
    std::optional<c10::SymInt> query_offset) {
  static const auto op = find_operator<decltype(alibi_add_symint)>("posenc::alibi_add");
  return op.call(scores, slopes, causal, std::move(query_offset));
}

void alibi_add_symint_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<c10::SymInt> query_offset) {
  static const auto op = find_operator<decltype(alibi_add_symint_)>("posenc::alibi_add_");
  op.call(scores, slopes, causal, std::move(query_offset));
}

Tensor alibi_mask(const Tensor& grad, std::optional<c10::SymInt> query_offset) {
  static const auto op = find_operator<decltype(alibi_mask)>("posenc::alibi_mask");
  return op.call(grad, std::move(query_offset));
}

Tensor alibi_add(const Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_add", "scores", scores);
  return alibi_add_symint(scores, slopes, causal, query_offset);
}

Tensor& alibi_add_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  check_defined("posenc::alibi_add_", "scores", scores);
  alibi_add_symint_(scores, slopes, causal, query_offset);
  return scores;
}

Tensor alibi_slopes_backward(const Tensor& grad, bool causal, std::optional<c10::SymInt> query_offset) {
  static const auto op = find_operator<decltype(alibi_slopes_backward)>("posenc::alibi_slopes_backward");
  return op.call(grad, causal, std::move(query_offset));
}

}  // namespace posenc
