#include <autocast/detail/attention_dtype.h>
#include <ops/alibi_attention.h>

#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

template <c10::DeviceType Device>
std::tuple<Tensor, Tensor> alibi_attention_autocast(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  const autocast::AttentionDtype<Device> cast;
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
