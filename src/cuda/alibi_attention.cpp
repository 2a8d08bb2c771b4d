#include <blockwise/call.h>
#include <cuda/detail/rows_attention.h>
#include <cuda/detail/tiled_attention.h>
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

using arguments::AlibiAttention;
using at::Tensor;

/// What computes a call.
enum class Path : uint8_t {
  cudnn,  // fused kernels of cuDNN, with a plan for each shape
  tiled,  // the kernels of this library
  rows,   // matrix products of blocks of rows
};

/// What a call reads and computes beyond the forward pass.
struct Wanted {
  bool grad_lse = false;     // a gradient flows through lse
  bool slopes_grad = false;  // the gradient of the slopes, or the sums that it is computed from
};

#if POSENC_CUDNN
/// cuDNN is not used for fewer queries. Those are calls of decoding, where the number of keys grows in every step and
/// each number would need a plan, which takes 40 ms to build.
constexpr int64_t kFewestQueriesOfPlans = 64;

/// The reason why cuDNN does not compute a call; empty if it does.
std::string why_not_cudnn(const AlibiAttention& call, const AttentionTensors& inputs, const Wanted& wanted) {
  if (call.packed()) {
    return "cuDNN would need padded copies of packed sequences";
  }
  if (call.q_len < kFewestQueriesOfPlans) {
    return "with few queries, as in decoding, cuDNN would build a plan in every step";
  }
  if (wanted.grad_lse) {
    return "cuDNN takes no gradient of lse";
  }
  if (wanted.slopes_grad && !cuda::has_attention_slopes_kernels()) {
    return "the kernel that computes the gradient of slopes beside cuDNN needs compute capability 9.0";
  }
  return cuda::why_not_cudnn(blockwise::padded_view(call, inputs));
}
#else
std::string why_not_cudnn(
    const AlibiAttention& /*call*/,
    const AttentionTensors& /*inputs*/,
    const Wanted& /*wanted*/) {
  return "the library was built without cuDNN (POSENC_CUDNN)";
}
#endif

/// Logs `path`, what computes a call, and `reason`, why a faster path does not.
void log_path(LogLevel level, const AttentionTensors& inputs, const char* path, const std::string& reason) {
  if (log_level() <= level) {
    log(level,
        c10::str(
            "alibi_attention: q ", inputs.q.sizes(), " ", inputs.q.scalar_type(), ", k ", inputs.k.sizes(), path,
            reason));
  }
}

Path path_of(const AlibiAttention& call, const AttentionTensors& inputs, const Wanted& wanted) {
  const std::string not_cudnn = why_not_cudnn(call, inputs, wanted);
  if (not_cudnn.empty()) {
    return Path::cudnn;
  }
  const std::string not_tiled = cuda::why_not_tiled(call, inputs);
  if (not_tiled.empty()) {
    log_path(LogLevel::debug, inputs, " by the kernels of this library: ", not_cudnn);
    return Path::tiled;
  }
  static std::once_flag once;
  LogLevel level = LogLevel::debug;
  std::call_once(once, [&level] { level = LogLevel::warning; });
  log_path(level, inputs, " in blocks of matrix products, slower than fused attention: ", not_tiled);
  return Path::rows;
}

std::tuple<Tensor, Tensor> alibi_attention_cuda(
    const ConcreteAttentionOptions& options,
    const AttentionTensors& inputs) {
  const auto call = arguments::check_attention("posenc::alibi_attention", inputs, options);
  const c10::cuda::CUDAGuard device(inputs.q.device());
  const Path path = path_of(call, inputs, {});
#if POSENC_CUDNN
  if (path == Path::cudnn) {
    return blockwise::forward(call, inputs, cuda::cudnn_attention);
  }
#endif
  return path == Path::tiled ? cuda::tiled_attention(call, inputs)
                             : blockwise::forward(call, inputs, cuda::rows_attention);
}

#if POSENC_CUDNN
AttentionGradients cudnn_backward(
    const blockwise::Padded& batch,
    const Tensor& grad_out,
    const Tensor& /*grad_lse*/,
    const Tensor& out,
    const Tensor& lse,
    bool slopes_grad) {
  // cuDNN computes rowsum(dout * out) itself.
  const Tensor grad = cuda::readable_rows(batch, grad_out);
  const Tensor result = cuda::readable_rows(batch, out);
  return std::tuple_cat(
      cuda::cudnn_attention_backward(batch, grad, result, lse),
      std::tuple(slopes_grad ? cuda::attention_slopes_backward(batch, grad, lse) : Tensor()));
}

Tensor cudnn_slope_sums(const blockwise::Padded& batch, const Tensor& grad_out, const Tensor& lse) {
  return cuda::attention_slope_sums(batch, cuda::readable_rows(batch, grad_out), lse);
}
#endif

AttentionGradients alibi_attention_backward_cuda(
    const ConcreteAttentionOptions& options,
    const AttentionBackwardArguments& arguments,
    bool slopes_wanted) {
  const bool slopes_grad = slopes_wanted && arguments.slopes.has_value();
  const auto call = arguments::check_attention_backward("posenc::alibi_attention_backward", arguments, options);
  const c10::cuda::CUDAGuard device(arguments.q.device());
  const Path path = path_of(call, arguments.inputs(), {arguments.grad_lse.has_value(), slopes_grad});
#if POSENC_CUDNN
  if (path == Path::cudnn) {
    return blockwise::backward(call, arguments, slopes_grad, cudnn_backward);
  }
#endif
  return path == Path::tiled ? cuda::tiled_attention_backward(call, arguments, slopes_grad)
                             : blockwise::backward(call, arguments, slopes_grad, cuda::rows_attention_backward);
}

Tensor alibi_attention_slope_sums_cuda(
    const ConcreteAttentionOptions& options,
    const AttentionSlopeSumsArguments& arguments) {
  const auto call = arguments::check_attention_slope_sums("posenc::alibi_attention_slope_sums", arguments, options);
  const c10::cuda::CUDAGuard device(arguments.q.device());
  const Path path = path_of(call, arguments.inputs(), {/*grad_lse=*/false, /*slopes_grad=*/true});
#if POSENC_CUDNN
  if (path == Path::cudnn) {
    return blockwise::slope_sums(call, arguments, cudnn_slope_sums);
  }
#endif
  return path == Path::tiled ? cuda::tiled_attention_slope_sums(call, arguments)
                             : blockwise::slope_sums(call, arguments, cuda::rows_attention_slope_sums);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("alibi_attention", kernel<alibi_attention_cuda>);
  m.impl("alibi_attention_backward", kernel<alibi_attention_backward_cuda>);
  m.impl("alibi_attention_slope_sums", kernel<alibi_attention_slope_sums_cuda>);
}

}  // namespace posenc
