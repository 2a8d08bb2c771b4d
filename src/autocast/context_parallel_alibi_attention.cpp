#include <autocast/detail/attention_dtype.h>
#include <ops/context_parallel_alibi_attention.h>

namespace posenc {
namespace {

using at::Tensor;

template <typename Group, c10::DeviceType Device>
std::tuple<Tensor, Tensor> context_parallel_alibi_attention_autocast(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Group& group,
    const ContextParallelALiBiAttentionOptions& options) {
  const autocast::AttentionDtype<Device> cast;
  return context_parallel_alibi_attention_with_lse(cast(q), cast(k), cast(v), slopes, group, options);
}

/// The backward pass keeps the dtypes of the forward pass.
template <c10::DeviceType Device>
void implement(torch::Library& m) {
  m.impl(
      "context_parallel_alibi_attention",
      context_parallel_alibi_attention_kernel<
          context_parallel_alibi_attention_autocast<std::string, Device>, std::string>);
#ifdef USE_DISTRIBUTED
  m.impl(
      "context_parallel_alibi_attention.group",
      context_parallel_alibi_attention_kernel<
          context_parallel_alibi_attention_autocast<ProcessGroup, Device>, ProcessGroup>);
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, AutocastCPU, m) {
  implement<c10::kCPU>(m);
}

TORCH_LIBRARY_IMPL(posenc, AutocastCUDA, m) {
  implement<c10::kCUDA>(m);
}

}  // namespace posenc
