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

bool any_symbolic(const ALiBiAttentionOptions& o) {
  const std::optional<Tensor> tensors[] = {o.seqlens_q(), o.seqlens_k(), o.cu_seqlens_q(), o.cu_seqlens_k()};
  return std::any_of(std::begin(tensors), std::end(tensors), [](const std::optional<Tensor>& tensor) {
    return tensor.has_value() && has_symbolic_sizes(*tensor);
  });
}

std::tuple<Tensor, Tensor> alibi_attention_meta(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  if (!any_symbolic({q, k, v, slopes}) && !any_symbolic(options)) {
    contract::alibi_attention("posenc::alibi_attention", q, k, v, slopes, options);
  }
  const auto wide = q.options().dtype(contract::alibi_slopes_dtype(q.scalar_type()));
  // Packed: [T, H, D] to [H, T].
  Tensor lse = q.dim() == 3 ? at::empty_symint({q.sym_size(0), q.sym_size(1)}, wide).t()
                            : at::empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(1)}, wide);
  return {at::empty_like(q), lse};
}

Tensor alibi_attention_slope_sums_meta(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& lse,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset) {
  if (!any_symbolic({grad_out, q, k, v, slopes, lse})) {
    contract::alibi_attention_slope_sums(
        "posenc::alibi_attention_slope_sums", grad_out, q, k, v, slopes, lse, scale, causal, query_offset);
  }
  return at::empty_symint({4, q.sym_size(0), q.sym_size(2), q.sym_size(1)}, q.options().dtype(at::kDouble));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward_meta(
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    const ALiBiAttentionOptions& options,
    bool slopes_grad) {
  if (!any_symbolic({grad_out, q, k, v, slopes, out, lse}) && !any_symbolic(options)) {
    contract::alibi_attention_backward(
        "posenc::alibi_attention_backward", grad_out, grad_lse, q, k, v, slopes, out, lse, options);
  }
  Tensor grad_slopes;
  if (slopes_grad) {
    grad_slopes =
        at::empty_symint({slopes.sym_size(0)}, q.options().dtype(contract::alibi_slopes_dtype(q.scalar_type())));
  }
  return {at::empty_like(q), at::empty_like(k), at::empty_like(v), grad_slopes};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_attention", alibi_attention_kernel<alibi_attention_meta>);
  m.impl("alibi_attention_backward", alibi_attention_backward_kernel<alibi_attention_backward_meta>);
  m.impl("alibi_attention_slope_sums", alibi_attention_slope_sums_meta);
}

}  // namespace posenc
