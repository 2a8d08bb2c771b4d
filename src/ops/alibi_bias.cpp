#include <contract/tensor.h>
#include <ops/alibi_bias.h>
#include <posenc/alibi.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <utility>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "alibi_bias(Tensor slopes, SymInt q_len, SymInt k_len, *, bool causal=False, ScalarType dtype=float, "
      "SymInt? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

Tensor alibi_bias_symint(
    const Tensor& slopes,
    c10::SymInt q_len,
    c10::SymInt k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<c10::SymInt> query_offset) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("posenc::alibi_bias", "").typed<decltype(alibi_bias_symint)>();
  return op.call(slopes, std::move(q_len), std::move(k_len), causal, dtype, std::move(query_offset));
}

Tensor alibi_bias(
    const Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<int64_t> query_offset) {
  contract::check_defined("posenc::alibi_bias", "slopes", slopes);
  return alibi_bias_symint(slopes, q_len, k_len, causal, dtype, query_offset);
}

}  // namespace posenc
