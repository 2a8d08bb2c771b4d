#include <attention/blockwise.h>
#include <ops/alibi_attention.h>

#include <torch/library.h>

#include <limits>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> alibi_attention_cpu(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  const auto checked = contract::alibi_attention("posenc::alibi_attention", q, k, v, slopes, options);
  const attention::PaddedCall call(checked, q, k, v, slopes);
  const auto [out, lse] = attention::blockwise(call.padded());
  return {call.unpad_q(out), call.unpad_lse(lse, -std::numeric_limits<double>::infinity())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward_cpu(
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    const ALiBiAttentionOptions& options,
    bool slopes_grad) {
  const auto checked = contract::alibi_attention_backward(
      "posenc::alibi_attention_backward", grad_out, grad_lse, q, k, v, slopes, out, lse, options);
  const attention::PaddedCall call(checked, q, k, v, slopes);
  auto [grad_q, grad_k, grad_v, grad_slopes] = attention::blockwise_backward(
      call.padded(), call.pad_q(grad_out), grad_lse.has_value() ? call.pad_lse(*grad_lse) : Tensor(), call.pad_q(out),
      call.pad_lse(lse), slopes_grad);
  return {call.unpad_q(grad_q), call.unpad_k(grad_k), call.unpad_k(grad_v), grad_slopes};
}

Tensor alibi_attention_slope_sums_cpu(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& lse,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset) {
  const auto checked = contract::alibi_attention_slope_sums(
      "posenc::alibi_attention_slope_sums", grad_out, q, k, v, slopes, lse, scale, causal, query_offset);
  const attention::PaddedCall call(checked, q, k, v, slopes);
  return attention::blockwise_slope_sums(call.padded(), grad_out, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_attention", alibi_attention_kernel<alibi_attention_cpu>);
  m.impl("alibi_attention_backward", alibi_attention_backward_kernel<alibi_attention_backward_cpu>);
  m.impl("alibi_attention_slope_sums", alibi_attention_slope_sums_cpu);
}

}  // namespace posenc
