#include <attention/call.h>
#include <ops/alibi_attention.h>

#include <torch/library.h>

// The second derivative of attention has one implementation for all devices, in tensor operations.
namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> alibi_attention_double_backward_composite(
    const ConcreteAttentionOptions& options,
    const std::optional<Tensor>& grad_grad_q,
    const std::optional<Tensor>& grad_grad_k,
    const std::optional<Tensor>& grad_grad_v,
    const std::optional<Tensor>& grad_grad_slopes,
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes) {
  const auto call = contract::alibi_attention_double_backward(
      "posenc::alibi_attention_double_backward", grad_grad_q, grad_grad_k, grad_grad_v, grad_grad_slopes, grad_out,
      grad_lse, q, k, v, slopes, options);
  const auto or_undefined = [](const std::optional<Tensor>& x) { return x.value_or(Tensor()); };
  attention::SecondOrderResult result = attention::double_backward(
      call, grad_out, or_undefined(grad_lse), q, k, v, slopes,
      {or_undefined(grad_grad_q), or_undefined(grad_grad_k), or_undefined(grad_grad_v),
       or_undefined(grad_grad_slopes)});
  return {result.grad_out, result.grad_lse, result.q, result.k, result.v, result.slopes};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  m.impl("alibi_attention_double_backward", AttentionKernel<alibi_attention_double_backward_composite>::call);
}

}  // namespace posenc
