#include <ops/context_parallel_alibi_attention.h>

#include <arguments/tensor.h>
#include <ops/dispatch.h>
#include <posenc/context_parallel_alibi_attention.h>
#ifdef USE_DISTRIBUTED
#include <context_parallel/group.h>
#endif

#include <torch/library.h>

#include <string>

namespace posenc {
namespace {

using at::Tensor;

constexpr const char* kForward = "posenc::context_parallel_alibi_attention";
constexpr const char* kBackward = "posenc::context_parallel_alibi_attention_backward";

}  // namespace

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "context_parallel_alibi_attention(Tensor q, Tensor k, Tensor v, Tensor? slopes, str group_name, *, "
      "float? scale=None, bool causal=False) -> (Tensor out, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "context_parallel_alibi_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
      "Tensor? slopes, Tensor out, Tensor lse, str group_name, *, float? scale=None, bool causal=False, "
      "bool[4] grad_mask=[True, True, True, True]) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

namespace dispatch {

std::tuple<Tensor, Tensor> context_parallel_alibi_attention(
    const ContextParallelOptions& options,
    const AttentionTensors& inputs) {
  return call_operator<&context_parallel_alibi_attention>(kForward, options, inputs);
}

AttentionGradients context_parallel_alibi_attention_backward(
    const AttentionGradMask& mask,
    const AttentionBackwardArguments& arguments,
    const ContextParallelOptions& options) {
  return call_operator<&context_parallel_alibi_attention_backward>(kBackward, mask, arguments, options);
}

}  // namespace dispatch

Tensor context_parallel_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const std::string& group_name,
    const ContextParallelAttentionOptions& options) {
  arguments::check_defined(kForward, "q", q);
  return std::get<0>(dispatch::context_parallel_alibi_attention(
      {group_name, options.scale(), options.causal()}, {q, k, v, options.slopes()}));
}

Tensor context_parallel_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ContextParallelAttentionOptions& options) {
#ifdef USE_DISTRIBUTED
  return context_parallel_attention(q, k, v, context_parallel::name_of_group(kForward, group), options);
#else
  return context_parallel_attention(q, k, v, std::string(), options);  // which refuses the call
#endif
}

Tensor context_parallel_alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const std::string& group_name,
    const ContextParallelALiBiAttentionOptions& options) {
  arguments::check_slopes_argument(kForward, slopes, options.slopes());
  return context_parallel_attention(q, k, v, group_name, ContextParallelAttentionOptions(options).slopes(slopes));
}

Tensor context_parallel_alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const c10::intrusive_ptr<c10d::ProcessGroup>& group,
    const ContextParallelALiBiAttentionOptions& options) {
  arguments::check_slopes_argument(kForward, slopes, options.slopes());
  return context_parallel_attention(q, k, v, group, ContextParallelAttentionOptions(options).slopes(slopes));
}

#ifndef USE_DISTRIBUTED
namespace {

[[noreturn]] void refuse(const char* op) {
  TORCH_CHECK(false, op, ": expected a LibTorch with process groups, got one that was built without c10d");
}

std::tuple<Tensor, Tensor> refuse_forward(
    const ContextParallelOptions& /*options*/,
    const AttentionTensors& /*inputs*/) {
  refuse(kForward);
}

AttentionGradients refuse_backward(
    const AttentionGradMask& /*mask*/,
    const AttentionBackwardArguments& /*arguments*/,
    const ContextParallelOptions& /*options*/) {
  refuse(kBackward);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  m.impl("context_parallel_alibi_attention", kernel<refuse_forward>);
  m.impl("context_parallel_alibi_attention_backward", kernel<refuse_backward>);
}
#endif

}  // namespace posenc
