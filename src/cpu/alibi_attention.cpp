#include <blockwise/blockwise.h>
#include <blockwise/call.h>
#include <cpu/detail/attention.h>
#include <ops/alibi_attention.h>
#include <ops/dispatch.h>

#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

/// Whether the kernels compute a batch. The others are computed in matrix products of blocks of rows.
bool has_kernel(const blockwise::Padded& batch) {
  const bool windows = batch.window_left.has_value() || batch.window_right.has_value();
  const bool slopes_of_heads = !batch.slopes.defined() || batch.slopes.dim() == 1;
  return slopes_of_heads && !windows && !batch.softcap.has_value();
}

std::tuple<Tensor, Tensor> compute_forward(const blockwise::Padded& batch) {
  return has_kernel(batch) ? cpu::attention(batch) : blockwise::blockwise(batch);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compute_backward(
    const blockwise::Padded& batch,
    const Tensor& grad_out,
    const Tensor& grad_lse,
    const Tensor& out,
    const Tensor& lse,
    bool slopes_grad) {
  return (has_kernel(batch) ? cpu::attention_backward : blockwise::blockwise_backward)(
      batch, grad_out, grad_lse, out, lse, slopes_grad);
}

std::tuple<Tensor, Tensor> alibi_attention_cpu(
    const ConcreteAttentionOptions& options,
    const AttentionTensors& inputs) {
  const auto call = arguments::check_attention("posenc::alibi_attention", inputs, options);
  return blockwise::forward(call, inputs, compute_forward);
}

AttentionGradients alibi_attention_backward_cpu(
    const ConcreteAttentionOptions& options,
    const AttentionBackwardArguments& arguments,
    bool slopes_grad) {
  const auto call = arguments::check_attention_backward("posenc::alibi_attention_backward", arguments, options);
  return blockwise::backward(call, arguments, slopes_grad, compute_backward);
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
