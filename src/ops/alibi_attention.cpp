#include <ops/alibi_attention.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

namespace posenc {
namespace {

using at::Tensor;

/// The options in a schema.
constexpr const char* kOptions =
    "float? scale=None, bool causal=False, SymInt? query_offset=None, Tensor? seqlens_q=None, Tensor? seqlens_k=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None)";

/// Calls the operator whose kernels are those of `Function`.
template <auto Function, typename... Arguments>
auto call(const char* name, const SymbolicAttentionOptions& o, const Arguments&... arguments) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<decltype(AttentionKernel<Function>::call)>();
  return op.call(
      arguments..., o.scale, o.causal, o.query_offset, o.seqlens_q, o.seqlens_k, o.cu_seqlens_q, o.cu_seqlens_k,
      o.max_seqlen_q, o.max_seqlen_k);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  const auto define = [&m](const std::string& arguments, const std::string& results) {
    const std::string schema = arguments + kOptions + " -> " + results;
    m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  };
  define("alibi_attention(Tensor q, Tensor k, Tensor v, Tensor slopes, *, ", "(Tensor out, Tensor lse)");
  define(
      "alibi_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor slopes, "
      "Tensor out, Tensor lse, *, bool slopes_grad=True, ",
      "(Tensor, Tensor, Tensor, Tensor)");
  define(
      "alibi_attention_double_backward(Tensor? grad_grad_q, Tensor? grad_grad_k, Tensor? grad_grad_v, "
      "Tensor? grad_grad_slopes, Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor slopes, *, ",
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  define(
      "alibi_attention_slope_sums(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor slopes, Tensor lse, *, ",
      "Tensor");
}

std::tuple<Tensor, Tensor> alibi_attention_with_lse(
    const SymbolicAttentionOptions& options,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes) {
  constexpr std::tuple<Tensor, Tensor> (*kFunction)(
      const SymbolicAttentionOptions&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) =
      alibi_attention_with_lse;
  return call<kFunction>("posenc::alibi_attention", options, q, k, v, slopes);
}

std::tuple<Tensor, Tensor> alibi_attention_with_lse(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  return alibi_attention_with_lse(contract::attention_options<c10::SymInt>(options), q, k, v, slopes);
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
  return call<alibi_attention_backward>(
      "posenc::alibi_attention_backward", options, grad_out, grad_lse, q, k, v, slopes, out, lse, slopes_grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> alibi_attention_double_backward(
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
  return call<alibi_attention_double_backward>(
      "posenc::alibi_attention_double_backward", options, grad_grad_q, grad_grad_k, grad_grad_v, grad_grad_slopes,
      grad_out, grad_lse, q, k, v, slopes);
}

Tensor alibi_attention_slope_sums(
    const SymbolicAttentionOptions& options,
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const Tensor& lse) {
  return call<alibi_attention_slope_sums>(
      "posenc::alibi_attention_slope_sums", options, grad_out, q, k, v, slopes, lse);
}

}  // namespace posenc
