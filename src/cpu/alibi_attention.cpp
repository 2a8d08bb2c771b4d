#include <attention/blockwise.h>
#include <attention/call.h>
#include <ops/alibi_attention.h>

#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> alibi_attention_cpu(
    const ConcreteAttentionOptions& options,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes) {
  const auto call = contract::alibi_attention("posenc::alibi_attention", q, k, v, slopes, options);
  return attention::forward(call, q, k, v, slopes, attention::blockwise);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward_cpu(
    const ConcreteAttentionOptions& options,
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    bool slopes_grad) {
  const auto call = contract::alibi_attention_backward(
      "posenc::alibi_attention_backward", grad_out, grad_lse, q, k, v, slopes, out, lse, options);
  return attention::backward(
      call, grad_out, grad_lse.value_or(Tensor()), q, k, v, slopes, out, lse, slopes_grad,
      attention::blockwise_backward);
}

Tensor alibi_attention_slope_sums_cpu(
    const ConcreteAttentionOptions& options,
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& lse) {
  const auto call = contract::alibi_attention_slope_sums(
      "posenc::alibi_attention_slope_sums", grad_out, q, k, v, slopes, lse, options);
  return attention::slope_sums(call, grad_out, q, k, v, slopes, lse, attention::blockwise_slope_sums);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_attention", AttentionKernel<alibi_attention_cpu>::call);
  m.impl("alibi_attention_backward", AttentionKernel<alibi_attention_backward_cpu>::call);
  m.impl("alibi_attention_slope_sums", AttentionKernel<alibi_attention_slope_sums_cpu>::call);
}

}  // namespace posenc
