#include <contract/alibi.h>
#include <contract/alibi_attention.h>
#include <meta/detail/symbolic.h>
#include <ops/alibi_attention.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

namespace posenc {
namespace {

using at::Tensor;
using meta::any_symbolic;
using meta::has_symbolic_sizes;

/// The options as numbers, where none is a symbol: only then can a call be checked.
std::optional<ConcreteAttentionOptions> concrete(const SymbolicAttentionOptions& o) {
  ConcreteAttentionOptions result{o.scale,        o.causal,       std::nullopt, o.seqlens_q, o.seqlens_k,
                                  o.cu_seqlens_q, o.cu_seqlens_k, std::nullopt, std::nullopt};
  for (const std::optional<Tensor>* tensor : {&o.seqlens_q, &o.seqlens_k, &o.cu_seqlens_q, &o.cu_seqlens_k}) {
    if (tensor->has_value() && has_symbolic_sizes(**tensor)) {
      return std::nullopt;
    }
  }
  const std::pair<const std::optional<c10::SymInt>*, std::optional<int64_t>*> integers[] = {
      {&o.query_offset, &result.query_offset},
      {&o.max_seqlen_q, &result.max_seqlen_q},
      {&o.max_seqlen_k, &result.max_seqlen_k}};
  for (const auto& [symbol, number] : integers) {
    if (symbol->has_value()) {
      *number = (*symbol)->maybe_as_int();
      if (!number->has_value()) {
        return std::nullopt;
      }
    }
  }
  return result;
}

at::TensorOptions dtype_of_sums(const Tensor& q) {
  return q.options().dtype(contract::alibi_slopes_dtype(q.scalar_type()));
}

/// Packed: [Hq, T], as the transpose of a contiguous tensor.
Tensor empty_lse(const Tensor& q) {
  return q.dim() == 3 ? at::empty_symint({q.sym_size(0), q.sym_size(1)}, dtype_of_sums(q)).t()
                      : at::empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(1)}, dtype_of_sums(q));
}

std::tuple<Tensor, Tensor> alibi_attention_meta(
    const SymbolicAttentionOptions& options,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes) {
  if (const auto numbers = concrete(options); numbers && !any_symbolic({q, k, v, slopes})) {
    contract::alibi_attention("posenc::alibi_attention", q, k, v, slopes, *numbers);
  }
  return {at::empty_like(q), empty_lse(q)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward_meta(
    const SymbolicAttentionOptions& options,
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    bool slopes_grad) {
  if (const auto numbers = concrete(options); numbers && !any_symbolic({grad_out, q, k, v, slopes, out, lse})) {
    contract::alibi_attention_backward(
        "posenc::alibi_attention_backward", grad_out, grad_lse, q, k, v, slopes, out, lse, *numbers);
  }
  Tensor grad_slopes;
  if (slopes_grad) {
    grad_slopes = at::empty_symint({slopes.sym_size(0)}, dtype_of_sums(q));
  }
  return {at::empty_like(q), at::empty_like(k), at::empty_like(v), grad_slopes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> alibi_attention_double_backward_meta(
    const SymbolicAttentionOptions& options,
    const std::optional<Tensor>& grad_grad_q,
    const std::optional<Tensor>& grad_grad_k,
    const std::optional<Tensor>& grad_grad_v,
    const std::optional<Tensor>& grad_grad_slopes,
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes) {
  if (const auto numbers = concrete(options); numbers && !any_symbolic({grad_out, q, k, v, slopes})) {
    contract::alibi_attention_double_backward(
        "posenc::alibi_attention_double_backward", grad_grad_q, grad_grad_k, grad_grad_v, grad_grad_slopes, grad_out,
        grad_lse, q, k, v, slopes, *numbers);
  }
  return {at::empty_like(q), empty_lse(q),      at::empty_like(q),
          at::empty_like(k), at::empty_like(v), at::empty_symint({slopes.sym_size(0)}, dtype_of_sums(q))};
}

Tensor alibi_attention_slope_sums_meta(
    const SymbolicAttentionOptions& options,
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& lse) {
  if (const auto numbers = concrete(options); numbers && !any_symbolic({grad_out, q, k, v, slopes, lse})) {
    contract::alibi_attention_slope_sums(
        "posenc::alibi_attention_slope_sums", grad_out, q, k, v, slopes, lse, *numbers);
  }
  return at::empty_symint({4, q.sym_size(0), q.sym_size(2), q.sym_size(1)}, q.options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_attention", AttentionKernel<alibi_attention_meta>::call);
  m.impl("alibi_attention_backward", AttentionKernel<alibi_attention_backward_meta>::call);
  m.impl("alibi_attention_double_backward", AttentionKernel<alibi_attention_double_backward_meta>::call);
  m.impl("alibi_attention_slope_sums", AttentionKernel<alibi_attention_slope_sums_meta>::call);
}

}  // namespace posenc
