#include <blockwise/call.h>
#include <blockwise/slope_sums.h>
#include <cpu/detail/attention.h>
#include <ops/alibi_attention.h>
#include <ops/dispatch.h>

#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> alibi_attention_cpu(
    const ConcreteAttentionOptions& options,
    const AttentionTensors& inputs) {
  const auto call = arguments::check_attention("posenc::alibi_attention", inputs, options);
  return blockwise::forward(call, inputs, cpu::attention);
}

AttentionGradients alibi_attention_backward_cpu(
    const ConcreteAttentionOptions& options,
    const AttentionBackwardArguments& arguments,
    bool slopes_grad) {
  const auto call = arguments::check_attention_backward("posenc::alibi_attention_backward", arguments, options);
  return blockwise::backward(call, arguments, slopes_grad, cpu::attention_backward);
}

Tensor alibi_attention_slope_sums_cpu(
    const ConcreteAttentionOptions& options,
    const AttentionSlopeSumsArguments& arguments) {
  const auto call = arguments::check_attention_slope_sums("posenc::alibi_attention_slope_sums", arguments, options);
  return blockwise::slope_sums(call, arguments, blockwise::blockwise_slope_sums);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("alibi_attention", kernel<alibi_attention_cpu>);
  m.impl("alibi_attention_backward", kernel<alibi_attention_backward_cpu>);
  m.impl("alibi_attention_slope_sums", kernel<alibi_attention_slope_sums_cpu>);
}

}  // namespace posenc
