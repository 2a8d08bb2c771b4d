#include <attention/blockwise.h>
#include <ops/alibi_attention.h>
#include <posenc/logging.h>
#if POSENC_CUDNN
#include <cuda/detail/cudnn_attention.h>
#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/alibi_attention_slopes_kernel.cuh>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
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

cuda::HeadRows head_rows(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T, int D>
void launch_slopes(const cuda::AlibiAttentionSlopesProblem& problem, const dim3& grid) {
  const auto kernel = cuda::alibi_attention_slopes_kernel<T, D>;
  constexpr int kShared = cuda::kSlopesShared<D>;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  kernel<<<grid, cuda::kSlopesThreads, kShared, c10::cuda::getCurrentCUDAStream()>>>(problem);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch_slopes(int64_t head_dim, const cuda::AlibiAttentionSlopesProblem& problem, const dim3& grid) {
  // The head sizes that cuDNN is asked for.
  switch (head_dim) {
    case 32:
      return launch_slopes<T, 32>(problem, grid);
    case 64:
      return launch_slopes<T, 64>(problem, grid);
    case 80:
      return launch_slopes<T, 80>(problem, grid);
    case 96:
      return launch_slopes<T, 96>(problem, grid);
    case 128:
      return launch_slopes<T, 128>(problem, grid);
    case 192:
      return launch_slopes<T, 192>(problem, grid);
    case 256:
      return launch_slopes<T, 256>(problem, grid);
    default:
      TORCH_INTERNAL_ASSERT(false, "cuDNN is not asked for heads of ", head_dim);
  }
}

/// The gradient of the slopes of a call that cuDNN takes.
Tensor slopes_backward(const attention::Padded& call, const Tensor& grad_out, const Tensor& lse) {
  const int64_t heads = call.q_heads();
  const dim3 grid(cuda::ceil_div(call.q_len(), cuda::kSlopesRows), heads, call.batch());
  const Tensor dense_lse = lse.contiguous();
  const Tensor slopes = call.slopes.contiguous();
  const Tensor sums = at::empty({heads, call.batch(), grid.x}, call.q.options().dtype(at::kDouble));
  const auto lengths = [](const Tensor& seqlens) {
    return seqlens.defined() ? seqlens.const_data_ptr<int64_t>() : nullptr;
  };
  const Tensor seqlens_q = call.seqlens_q.defined() ? call.seqlens_q.contiguous() : Tensor();
  const Tensor seqlens_k = call.seqlens_k.defined() ? call.seqlens_k.contiguous() : Tensor();
  const cuda::AlibiAttentionSlopesProblem problem{
      head_rows(call.q),
      head_rows(call.k),
      head_rows(call.v),
      head_rows(grad_out),
      dense_lse.const_data_ptr<float>(),
      slopes.const_data_ptr<float>(),
      lengths(seqlens_q),
      lengths(seqlens_k),
      sums.mutable_data_ptr<double>(),
      static_cast<int32_t>(call.q_len()),
      static_cast<int32_t>(call.k_len()),
      static_cast<int32_t>(call.query_offset.value()),
      static_cast<int32_t>(heads / call.k_heads()),
      static_cast<float>(call.scale),
      call.causal};
  if (call.q.scalar_type() == at::kHalf) {
    launch_slopes<__half>(call.head_dim(), problem, grid);
  } else {
    launch_slopes<__nv_bfloat16>(call.head_dim(), problem, grid);
  }
  Tensor result = at::empty({heads}, call.q.options().dtype(at::kFloat));
  cuda::sum_of_heads_kernel<float><<<dim3(heads), cuda::kHeadSumThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      problem.sums, call.batch() * grid.x, result.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}
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
          std::tuple(slopes_grad ? slopes_backward(padded, grad, padded_lse) : Tensor()));
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
  return attention::blockwise_slope_sums(call.padded(), grad_out, lse);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_attention", alibi_attention_kernel<alibi_attention_cuda>);
  m.impl("alibi_attention_backward", alibi_attention_backward_kernel<alibi_attention_backward_cuda>);
  m.impl("alibi_attention_slope_sums", alibi_attention_slope_sums_cuda);
}

}  // namespace posenc
