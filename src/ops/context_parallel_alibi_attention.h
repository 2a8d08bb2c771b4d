#pragma once

#include <posenc/context_parallel_alibi_attention.h>

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#ifdef USE_DISTRIBUTED
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#endif

namespace posenc {

// `Group` is how a call tells its ranks: `std::string`, the name of a registered group, which graphs hold and Python
// calls with, or the object. Each is an overload of the operators.

using ProcessGroup = c10::intrusive_ptr<c10d::ProcessGroup>;

/// `context_parallel_alibi_attention` with the log-sum-exp over all keys of the rows of this rank, `[B, Hq, S / C]`.
/// Gradients flow through both.
template <typename Group>
std::tuple<at::Tensor, at::Tensor> context_parallel_alibi_attention_with_lse(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const Group& group,
    const ContextParallelALiBiAttentionOptions& options);

/// Its gradients, those of q, k, v and slopes that `grad_mask` names; the others are undefined.
/// @param grad_lse  of the shape of `lse`, or nothing for zeros.
template <typename Group>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> context_parallel_alibi_attention_backward(
    const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& out,
    const at::Tensor& lse,
    const Group& group,
    const ContextParallelALiBiAttentionOptions& options,
    std::array<bool, 4> grad_mask);

// As in ops/alibi_attention.h: kernels for the dispatcher, of functions with the parameters of these two.

template <auto Function, typename Group>
std::tuple<at::Tensor, at::Tensor> context_parallel_alibi_attention_kernel(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const Group& group,
    std::optional<double> scale,
    bool causal) {
  return Function(q, k, v, slopes, group, ContextParallelALiBiAttentionOptions().scale(scale).causal(causal));
}

template <auto Function, typename Group>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> context_parallel_alibi_attention_backward_kernel(
    const at::Tensor& grad_out,
    const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const at::Tensor& out,
    const at::Tensor& lse,
    const Group& group,
    std::optional<double> scale,
    bool causal,
    std::array<bool, 4> grad_mask) {
  return Function(
      grad_out, grad_lse, q, k, v, slopes, out, lse, group,
      ContextParallelALiBiAttentionOptions().scale(scale).causal(causal), grad_mask);
}

/// Makes kernels of one dispatch key for both operators and every kind of group: of the static functions `forward` and
/// `backward` of `Key<Group>`.
template <template <typename> typename Key>
void implement_context_parallel_alibi_attention(torch::Library& m) {
  m.impl(
      "context_parallel_alibi_attention",
      context_parallel_alibi_attention_kernel<Key<std::string>::forward, std::string>);
  m.impl(
      "context_parallel_alibi_attention_backward",
      context_parallel_alibi_attention_backward_kernel<Key<std::string>::backward, std::string>);
#ifdef USE_DISTRIBUTED
  m.impl(
      "context_parallel_alibi_attention.group",
      context_parallel_alibi_attention_kernel<Key<ProcessGroup>::forward, ProcessGroup>);
  m.impl(
      "context_parallel_alibi_attention_backward.group",
      context_parallel_alibi_attention_backward_kernel<Key<ProcessGroup>::backward, ProcessGroup>);
#endif
}

}  // namespace posenc
