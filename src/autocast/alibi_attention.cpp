#include <ops/context_parallel_alibi_attention.h>
#include <ops/dispatch.h>

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

/// Calls `kOperator` with q, k and v in the dtype of the autocast region, as LibTorch does for
/// scaled_dot_product_attention. Slopes stay float32: a slope of up to 1 that is rounded to bfloat16 changes the bias
/// by up to 16 at distance 8192. The backward pass keeps the dtypes of the forward pass.
template <c10::DeviceType kDevice, auto kOperator, typename Options>
std::tuple<Tensor, Tensor> attention_in_autocast_dtype(const Options& options, const AttentionTensors& inputs) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [dtype](const Tensor& x) { return x.defined() ? at::autocast::cached_cast(dtype, x, kDevice) : x; };
  return kOperator(options, {cast(inputs.q), cast(inputs.k), cast(inputs.v), inputs.slopes});
}

template <c10::DeviceType kDevice>
void implement(torch::Library& m) {
  m.impl(
      "alibi_attention",
      kernel<attention_in_autocast_dtype<kDevice, dispatch::alibi_attention, SymbolicAttentionOptions>>);
  m.impl(
      "context_parallel_alibi_attention",
      kernel<attention_in_autocast_dtype<kDevice, dispatch::context_parallel_alibi_attention, ContextParallelOptions>>);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, AutocastCPU, m) {
  implement<c10::kCPU>(m);
}

TORCH_LIBRARY_IMPL(posenc, AutocastCUDA, m) {
  implement<c10::kCUDA>(m);
}

}  // namespace posenc
