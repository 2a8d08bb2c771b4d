#include <attention/blockwise.h>
#include <ops/alibi_attention.h>
#include <posenc/logging.h>
#if POSENC_CUDNN
#include <cuda/detail/attention_slopes.h>
#include <cuda/detail/cudnn_attention.h>
#endif

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <mutex>
#include <string>

namespace posenc {
namespace {

using at::Tensor;

#if POSENC_CUDNN
using cuda::why_not_cudnn;
#else
std::string why_not_cudnn(const attention::Padded& /*call*/) {
  return "the library was built without cuDNN (POSENC_CUDNN)";
}
#endif

/// Whether cuDNN computes a call; where it does not, says so, and once as a warning.
bool takes_cudnn(const attention::Padded& call) {
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

std::tuple<Tensor, Tensor> alibi_attention_cuda(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  const auto checked = contract::alibi_attention("posenc::alibi_attention", q, k, v, slopes, options);
  const c10::cuda::CUDAGuard device(q.device());
  const attention::PaddedCall call(checked, q, k, v, slopes);
  const auto [out, lse] = [&] {
#if POSENC_CUDNN
    if (takes_cudnn(call.padded())) {
      return cuda::cudnn_attention(call.padded());
    }
#else
    takes_cudnn(call.padded());
#endif
    return attention::blockwise(call.padded());
  }();
  return {call.unpad_q(out), call.unpad_lse(lse, -std::numeric_limits<double>::infinity())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward_cuda(
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
  const c10::cuda::CUDAGuard device(q.device());
  const attention::PaddedCall call(checked, q, k, v, slopes);
  const attention::Padded& padded = call.padded();
  const Tensor padded_grad = call.pad_q(grad_out);
  const Tensor padded_out = call.pad_q(out);
  const Tensor padded_lse = call.pad_lse(lse);
  auto [grad_q, grad_k, grad_v, grad_slopes] = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
#if POSENC_CUDNN
    // cuDNN forms the sums of rows of dout * out itself: there is no place for the gradient of lse.
    if (!grad_lse.has_value() && takes_cudnn(padded)) {
      const Tensor grad = cuda::readable_rows(padded, padded_grad);
      const Tensor result = cuda::readable_rows(padded, padded_out);
      return std::tuple_cat(
          cuda::cudnn_attention_backward(padded, grad, result, padded_lse),
          std::tuple(slopes_grad ? cuda::attention_slopes_backward(padded, grad, padded_lse) : Tensor()));
    }
#endif
    return attention::blockwise_backward(
        padded, padded_grad, grad_lse.has_value() ? call.pad_lse(*grad_lse) : Tensor(), padded_out, padded_lse,
        slopes_grad);
  }();
  return {call.unpad_q(grad_q), call.unpad_k(grad_k), call.unpad_k(grad_v), grad_slopes};
}

Tensor alibi_attention_slope_sums_cuda(
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
  const c10::cuda::CUDAGuard device(q.device());
  const attention::PaddedCall call(checked, q, k, v, slopes);
#if POSENC_CUDNN
  if (takes_cudnn(call.padded())) {
    return cuda::attention_slope_sums(call.padded(), cuda::readable_rows(call.padded(), grad_out), lse);
  }
#endif
  return attention::blockwise_slope_sums(call.padded(), grad_out, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_attention", alibi_attention_kernel<alibi_attention_cuda>);
  m.impl("alibi_attention_backward", alibi_attention_backward_kernel<alibi_attention_backward_cuda>);
  m.impl("alibi_attention_slope_sums", alibi_attention_slope_sums_cuda);
}

}  // namespace posenc
