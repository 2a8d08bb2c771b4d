#include <ops/alibi_attention.h>

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

/// q, k and v in the dtype of the region, as LibTorch has it for scaled_dot_product_attention. Slopes stay float32: in
/// half they are wrong by 30 at distance 8192.
template <c10::DeviceType Device>
std::tuple<Tensor, Tensor> alibi_attention_autocast(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(Device));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(Device);
  const auto cast = [dtype](const Tensor& x) { return x.defined() ? at::autocast::cached_cast(dtype, x, Device) : x; };
  return alibi_attention_with_lse(cast(q), cast(k), cast(v), slopes, options);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, AutocastCPU, m) {
  m.impl("alibi_attention", alibi_attention_kernel<alibi_attention_autocast<c10::kCPU>>);
}

TORCH_LIBRARY_IMPL(posenc, AutocastCUDA, m) {
  m.impl("alibi_attention", alibi_attention_kernel<alibi_attention_autocast<c10::kCUDA>>);
}

}  // namespace posenc
