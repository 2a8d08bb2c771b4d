#include <blockwise/call.h>
#include <ops/alibi_attention.h>
#include <ops/dispatch.h>

#include <torch/library.h>

// The second derivative of attention has one implementation for all devices, in tensor operations.
namespace posenc {
namespace {

using at::Tensor;

AttentionSecondGradients alibi_attention_double_backward_composite(
    const ConcreteAttentionOptions& options,
    const AttentionDoubleBackwardArguments& a) {
  const auto call = arguments::check_attention_double_backward("posenc::alibi_attention_double_backward", a, options);
  const auto or_undefined = [](const std::optional<Tensor>& x) { return x.value_or(Tensor()); };
  blockwise::SecondOrderResult result = blockwise::double_backward(
      call, a.inputs(), a.grad_out, or_undefined(a.grad_lse),
      {or_undefined(a.grad_grad_q), or_undefined(a.grad_grad_k), or_undefined(a.grad_grad_v),
       or_undefined(a.grad_grad_slopes)});
  return {result.grad_out, result.grad_lse, result.q, result.k, result.v, result.slopes};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  m.impl("alibi_attention_double_backward", kernel<alibi_attention_double_backward_composite>);
}

}  // namespace posenc
