#include <blockwise/blockwise.h>
#include <blockwise/call.h>
#include <ops/alibi_attention.h>
#include <ops/dispatch.h>
#include <posenc/logging.h>
#if POSENC_CUDNN
#include <cuda/detail/attention_slopes.h>
#include <cuda/detail/cudnn_attention.h>
#endif

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <mutex>
#include <string>

namespace posenc {
namespace {

using at::Tensor;

#if POSENC_CUDNN
using cuda::why_not_cudnn;
#else
std::string why_not_cudnn(const blockwise::Padded& /*call*/) {
  return "the library was built without cuDNN (POSENC_CUDNN)";
}
#endif

/// Whether cuDNN computes a call. If not, logs the reason, the first time as a warning.
bool takes_cudnn(const blockwise::Padded& call) {
  const std::string reason = why_not_cudnn(call);
  if (reason.empty()) {
    return true;
  }
  const auto say = [&](LogLevel level) {
    log(level,
        c10::str(
            "alibi_attention: q ", call.q.sizes(), " ", call.q.scalar_type(), ", k ", call.k.sizes(),
            " in blocks of matrix products, slower than fused attention: ", reason));
  };
  static std::once_flag once;
  std::call_once(once, [&] { say(LogLevel::warning); });
  if (log_level() <= LogLevel::debug) {
    say(LogLevel::debug);
  }
  return false;
}

std::tuple<Tensor, Tensor> compute_forward(const blockwise::Padded& batch) {
#if POSENC_CUDNN
  if (takes_cudnn(batch)) {
    return cuda::cudnn_attention(batch);
  }
#else
  takes_cudnn(batch);
#endif
  return blockwise::blockwise(batch);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compute_backward(
    const blockwise::Padded& batch,
    const Tensor& grad_out,
    const Tensor& grad_lse,
    const Tensor& out,
    const Tensor& lse,
    bool slopes_grad) {
#if POSENC_CUDNN
  // cuDNN computes rowsum(dout * out) itself and has no input for the gradient of lse.
  if (!grad_lse.defined() && takes_cudnn(batch)) {
    const Tensor grad = cuda::readable_rows(batch, grad_out);
    const Tensor result = cuda::readable_rows(batch, out);
    return std::tuple_cat(
        cuda::cudnn_attention_backward(batch, grad, result, lse),
        std::tuple(slopes_grad ? cuda::attention_slopes_backward(batch, grad, lse) : Tensor()));
  }
#endif
  return blockwise::blockwise_backward(batch, grad_out, grad_lse, out, lse, slopes_grad);
}

Tensor compute_slope_sums(const blockwise::Padded& batch, const Tensor& grad_out, const Tensor& lse) {
#if POSENC_CUDNN
  if (takes_cudnn(batch)) {
    return cuda::attention_slope_sums(batch, cuda::readable_rows(batch, grad_out), lse);
  }
#endif
  return blockwise::blockwise_slope_sums(batch, grad_out, lse);
}

std::tuple<Tensor, Tensor> alibi_attention_cuda(
    const ConcreteAttentionOptions& options,
    const AttentionTensors& inputs) {
  const auto call = arguments::check_attention("posenc::alibi_attention", inputs, options);
  const c10::cuda::CUDAGuard device(inputs.q.device());
  return blockwise::forward(call, inputs, compute_forward);
}

AttentionGradients alibi_attention_backward_cuda(
    const ConcreteAttentionOptions& options,
    const AttentionBackwardArguments& arguments,
    bool slopes_grad) {
  const auto call = arguments::check_attention_backward("posenc::alibi_attention_backward", arguments, options);
  const c10::cuda::CUDAGuard device(arguments.q.device());
  return blockwise::backward(call, arguments, slopes_grad, compute_backward);
}

Tensor alibi_attention_slope_sums_cuda(
    const ConcreteAttentionOptions& options,
    const AttentionSlopeSumsArguments& arguments) {
  const auto call = arguments::check_attention_slope_sums("posenc::alibi_attention_slope_sums", arguments, options);
  const c10::cuda::CUDAGuard device(arguments.q.device());
  return blockwise::slope_sums(call, arguments, compute_slope_sums);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_attention", kernel<alibi_attention_cuda>);
  m.impl("alibi_attention_backward", kernel<alibi_attention_backward_cuda>);
  m.impl("alibi_attention_slope_sums", kernel<alibi_attention_slope_sums_cuda>);
}

}  // namespace posenc
