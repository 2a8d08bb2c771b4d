#include <contract/tensor.h>
#include <ops/alibi_add.h>
#include <posenc/alibi.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <utility>

namespace posenc {

using at::Tensor;
using contract::check_defined;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "alibi_add(Tensor scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // Without a result: torch.compile takes no operator that returns its argument.
  m.def(
      "alibi_add_(Tensor(a!) scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("alibi_mask(Tensor grad, *, SymInt? query_offset=None) -> Tensor", {at::Tag::pt2_compliant_tag});
}

Tensor alibi_add_symint(
    const Tensor& scores,
    const Tensor& slopes,
    bool causal,
    std::optional<c10::SymInt> query_offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("posenc::alibi_add", "").typed<decltype(alibi_add_symint)>();
  return op.call(scores, slopes, causal, std::move(query_offset));
}

void alibi_add_symint_(Tensor& scores, const Tensor& slopes, bool causal, std::optional<c10::SymInt> query_offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("posenc::alibi_add_", "").typed<decltype(alibi_add_symint_)>();
  op.call(scores, slopes, causal, std::move(query_offset));
}

Tensor alibi_mask(const Tensor& grad, std::optional<c10::SymInt> query_offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("posenc::alibi_mask", "").typed<decltype(alibi_mask)>();
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

}  // namespace posenc
