#include <ops/context_parallel_alibi_attention.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#ifdef USE_DISTRIBUTED
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#endif

namespace posenc {
namespace {

using at::Tensor;

/// The overload of an operator that takes a `Group`.
template <typename Group>
constexpr const char* kOverload = "group";
template <>
constexpr const char* kOverload<std::string> = "";

}  // namespace

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "context_parallel_alibi_attention(Tensor q, Tensor k, Tensor v, Tensor slopes, str group_name, *, "
      "float? scale=None, bool causal=False) -> (Tensor out, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "context_parallel_alibi_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor slopes, Tensor out, Tensor lse, str group_name, *, float? scale=None, bool causal=False, "
      "bool[4] grad_mask=[True, True, True, True]) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
#ifdef USE_DISTRIBUTED
  m.def(
      "context_parallel_alibi_attention.group(Tensor q, Tensor k, Tensor v, Tensor slopes, "
      "__torch__.torch.classes.c10d.ProcessGroup group, *, float? scale=None, bool causal=False) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "context_parallel_alibi_attention_backward.group(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
      "Tensor v, Tensor slopes, Tensor out, Tensor lse, __torch__.torch.classes.c10d.ProcessGroup group, *, "
      "float? scale=None, bool causal=False, bool[4] grad_mask=[True, True, True, True]) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
#endif
}

template <typename Group>
std::tuple<Tensor, Tensor> context_parallel_alibi_attention_with_lse(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Group& group,
    const ContextParallelALiBiAttentionOptions& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::context_parallel_alibi_attention", kOverload<Group>)
                             .template typed<decltype(context_parallel_alibi_attention_kernel<
                                                      context_parallel_alibi_attention_with_lse<Group>, Group>)>();
  return op.call(q, k, v, slopes, group, o.scale(), o.causal());
}

template <typename Group>
std::tuple<Tensor, Tensor, Tensor, Tensor> context_parallel_alibi_attention_backward(
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    const Group& group,
    const ContextParallelALiBiAttentionOptions& o,
    std::array<bool, 4> grad_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::context_parallel_alibi_attention_backward", kOverload<Group>)
                             .template typed<decltype(context_parallel_alibi_attention_backward_kernel<
                                                      context_parallel_alibi_attention_backward<Group>, Group>)>();
  return op.call(grad_out, grad_lse, q, k, v, slopes, out, lse, group, o.scale(), o.causal(), grad_mask);
}

template std::tuple<Tensor, Tensor> context_parallel_alibi_attention_with_lse(
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const std::string&,
    const ContextParallelALiBiAttentionOptions&);
template std::tuple<Tensor, Tensor, Tensor, Tensor> context_parallel_alibi_attention_backward(
    const Tensor&,
    const std::optional<Tensor>&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const std::string&,
    const ContextParallelALiBiAttentionOptions&,
    std::array<bool, 4>);

Tensor context_parallel_alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const std::string& group_name,
    const ContextParallelALiBiAttentionOptions& options) {
  return std::get<0>(context_parallel_alibi_attention_with_lse(q, k, v, slopes, group_name, options));
}

#ifdef USE_DISTRIBUTED
template std::tuple<Tensor, Tensor> context_parallel_alibi_attention_with_lse(
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const ProcessGroup&,
    const ContextParallelALiBiAttentionOptions&);
template std::tuple<Tensor, Tensor, Tensor, Tensor> context_parallel_alibi_attention_backward(
    const Tensor&,
    const std::optional<Tensor>&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const Tensor&,
    const ProcessGroup&,
    const ContextParallelALiBiAttentionOptions&,
    std::array<bool, 4>);

Tensor context_parallel_alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ProcessGroup& group,
    const ContextParallelALiBiAttentionOptions& options) {
  return std::get<0>(context_parallel_alibi_attention_with_lse(q, k, v, slopes, group, options));
}
#else
Tensor context_parallel_alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const c10::intrusive_ptr<c10d::ProcessGroup>& /*group*/,
    const ContextParallelALiBiAttentionOptions& options) {
  // Says that there are no groups.
  return context_parallel_alibi_attention(q, k, v, slopes, std::string(), options);
}
#endif

}  // namespace posenc
