#include <ops/alibi_attention.h>

#include <arguments/tensor.h>
#include <ops/dispatch.h>

#include <torch/library.h>

#include <string>
#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

constexpr const char* kAttention = "posenc::alibi_attention";

/// The options in a schema.
constexpr const char* kOptions =
    "float? scale=None, bool causal=False, SymInt? query_offset=None, Tensor? seqlens_q=None, Tensor? seqlens_k=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, "
    "SymInt? window_left=None, SymInt? window_right=None, float? softcap=None)";

}  // namespace

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  const auto define = [&m](const std::string& arguments, const std::string& results) {
    const std::string schema = arguments + kOptions + " -> " + results;
    m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
  };
  define("alibi_attention(Tensor q, Tensor k, Tensor v, Tensor? slopes, *, ", "(Tensor out, Tensor lse)");
  define(
      "alibi_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? slopes, "
      "Tensor out, Tensor lse, *, bool slopes_grad=True, ",
      "(Tensor, Tensor, Tensor, Tensor)");
  define(
      "alibi_attention_double_backward(Tensor? grad_grad_q, Tensor? grad_grad_k, Tensor? grad_grad_v, "
      "Tensor? grad_grad_slopes, Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? slopes, *, ",
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_sinks(Tensor out, Tensor lse, Tensor sinks) -> (Tensor out, Tensor lse)",
      {at::Tag::pt2_compliant_tag});
  define(
      "alibi_attention_slope_sums(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? slopes, Tensor lse, *, ",
      "Tensor");
}

namespace dispatch {

std::tuple<Tensor, Tensor> attention_sinks(const AttentionSinksArguments& arguments) {
  return call_operator<&attention_sinks>("posenc::attention_sinks", arguments);
}

std::tuple<Tensor, Tensor> alibi_attention(const SymbolicAttentionOptions& options, const AttentionTensors& inputs) {
  return call_operator<&alibi_attention>(kAttention, options, inputs);
}

AttentionGradients alibi_attention_backward(
    const SymbolicAttentionOptions& options,
    const AttentionBackwardArguments& arguments,
    bool slopes_grad) {
  return call_operator<&alibi_attention_backward>("posenc::alibi_attention_backward", options, arguments, slopes_grad);
}

AttentionSecondGradients alibi_attention_double_backward(
    const SymbolicAttentionOptions& options,
    const AttentionDoubleBackwardArguments& arguments) {
  return call_operator<&alibi_attention_double_backward>("posenc::alibi_attention_double_backward", options, arguments);
}

Tensor alibi_attention_slope_sums(
    const SymbolicAttentionOptions& options,
    const AttentionSlopeSumsArguments& arguments) {
  return call_operator<&alibi_attention_slope_sums>("posenc::alibi_attention_slope_sums", options, arguments);
}

}  // namespace dispatch

std::tuple<Tensor, Tensor> attention_with_lse(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const AttentionOptions& options) {
  arguments::check_defined(kAttention, "q", q);
  auto results =
      dispatch::alibi_attention(arguments::attention_options<c10::SymInt>(options), {q, k, v, options.slopes()});
  if (!options.sinks().has_value()) {
    return results;
  }
  const auto& [out, lse] = results;
  return dispatch::attention_sinks({out, lse, *options.sinks()});
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  return std::get<0>(attention_with_lse(q, k, v, options));
}

std::tuple<Tensor, Tensor> alibi_attention_with_lse(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  arguments::check_slopes_argument(kAttention, slopes, options.slopes());
  return attention_with_lse(q, k, v, AttentionOptions(options).slopes(slopes));
}

Tensor alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  return std::get<0>(alibi_attention_with_lse(q, k, v, slopes, options));
}

}  // namespace posenc
