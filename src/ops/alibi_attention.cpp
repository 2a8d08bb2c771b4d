#include <ops/alibi_attention.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace posenc {
using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "alibi_attention(Tensor q, Tensor k, Tensor v, Tensor slopes, *, float? scale=None, bool causal=False, "
      "int? query_offset=None, Tensor? seqlens_q=None, Tensor? seqlens_k=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None) -> (Tensor out, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "alibi_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor slopes, "
      "Tensor out, Tensor lse, *, float? scale=None, bool causal=False, int? query_offset=None, "
      "Tensor? seqlens_q=None, Tensor? seqlens_k=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "int? max_seqlen_q=None, int? max_seqlen_k=None, bool slopes_grad=True) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "alibi_attention_slope_sums(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor lse, *, "
      "float? scale=None, bool causal=False, int? query_offset=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<Tensor, Tensor> alibi_attention_with_lse(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::alibi_attention", "")
                             .typed<decltype(alibi_attention_kernel<alibi_attention_with_lse>)>();
  return op.call(
      q, k, v, slopes, o.scale(), o.causal(), o.query_offset(), o.seqlens_q(), o.seqlens_k(), o.cu_seqlens_q(),
      o.cu_seqlens_k(), o.max_seqlen_q(), o.max_seqlen_k());
}

Tensor alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  return std::get<0>(alibi_attention_with_lse(q, k, v, slopes, options));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alibi_attention_backward(
    const Tensor& grad_out,
    const std::optional<Tensor>& grad_lse,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& out,
    const Tensor& lse,
    const ALiBiAttentionOptions& o,
    bool slopes_grad) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::alibi_attention_backward", "")
                             .typed<decltype(alibi_attention_backward_kernel<alibi_attention_backward>)>();
  return op.call(
      grad_out, grad_lse, q, k, v, slopes, out, lse, o.scale(), o.causal(), o.query_offset(), o.seqlens_q(),
      o.seqlens_k(), o.cu_seqlens_q(), o.cu_seqlens_k(), o.max_seqlen_q(), o.max_seqlen_k(), slopes_grad);
}

Tensor alibi_attention_slope_sums(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& lse,
    std::optional<double> scale,
    bool causal,
    std::optional<int64_t> query_offset) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("posenc::alibi_attention_slope_sums", "")
                             .typed<decltype(alibi_attention_slope_sums)>();
  return op.call(grad_out, q, k, v, slopes, lse, scale, causal, query_offset);
}

}  // namespace posenc
