#include <ops/alibi_bias.h>

#include <arguments/tensor.h>
#include <posenc/alibi.h>

namespace posenc {

using arguments::check_defined;
using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  define(
      m,
      "alibi_bias(Tensor slopes, SymInt q_len, SymInt k_len, *, bool causal=False, ScalarType dtype=float, "
      "SymInt? query_offset=None) -> Tensor");
  define(m, "alibi_add(Tensor scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> Tensor");
  // Without a result: torch.compile takes no operator that returns its argument.
  define(m, "alibi_add_(Tensor(a!) scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> ()");
  define(m, "alibi_mask(Tensor grad, *, SymInt? query_offset=None) -> Tensor");
  define(m, "alibi_slopes_backward(Tensor grad, *, bool causal=False, SymInt? query_offset=None) -> Tensor");
}

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
