#include <autocast/detail/attention_dtype.h>
#include <ops/alibi_attention.h>

#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

template <c10::DeviceType Device>
std::tuple<Tensor, Tensor> alibi_attention_autocast(
    const SymbolicAttentionOptions& options,
    const AttentionTensors& inputs) {
  const autocast::AttentionDtype<Device> cast;
  return dispatch::alibi_attention(options, {cast(inputs.q), cast(inputs.k), cast(inputs.v), inputs.slopes});
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, AutocastCPU, m) {
  m.impl("alibi_attention", AttentionKernel<alibi_attention_autocast<c10::kCPU>>::call);
}

TORCH_LIBRARY_IMPL(posenc, AutocastCUDA, m) {
  m.impl("alibi_attention", AttentionKernel<alibi_attention_autocast<c10::kCUDA>>::call);
}

}  // namespace posenc
