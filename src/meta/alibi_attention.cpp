#include <arguments/alibi.h>
#include <arguments/alibi_attention.h>
#include <meta/detail/symbolic.h>
#include <ops/alibi_attention.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
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
  return q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type()));
}

/// Packed: [Hq, T], as the transpose of a contiguous tensor.
Tensor empty_lse(const Tensor& q) {
  return q.dim() == 3 ? at::empty_symint({q.sym_size(0), q.sym_size(1)}, dtype_of_sums(q)).t()
                      : at::empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(1)}, dtype_of_sums(q));
}

bool is_symbolic(const Tensor& x) {
  return has_symbolic_sizes(x);
}
bool is_symbolic(const std::optional<Tensor>& x) {
  return x.has_value() && has_symbolic_sizes(*x);
}
bool is_symbolic(bool /*x*/) {
  return false;
}

/// `check_arguments(op, arguments, options)` where nothing is a symbol.
template <typename Check, typename Arguments>
void check(
    const Check& check_arguments,
    const char* op,
    const Arguments& arguments,
    const SymbolicAttentionOptions& options) {
  const auto numbers = concrete(options);
  const bool symbolic =
      std::apply([](const auto&... members) { return (is_symbolic(members) || ...); }, arguments.flat());
  if (numbers.has_value() && !symbolic) {
    check_arguments(op, arguments, *numbers);
  }
}

std::tuple<Tensor, Tensor> alibi_attention_meta(
    const SymbolicAttentionOptions& options,
    const AttentionTensors& inputs) {
  check(arguments::check_attention, "posenc::alibi_attention", inputs, options);
  return {at::empty_like(inputs.q), empty_lse(inputs.q)};
}

AttentionGradients alibi_attention_backward_meta(
    const SymbolicAttentionOptions& options,
    const AttentionBackwardArguments& a) {
  check(arguments::check_attention_backward, "posenc::alibi_attention_backward", a, options);
  Tensor grad_slopes;
  if (a.slopes_grad) {
    grad_slopes = at::empty_symint({a.slopes.sym_size(0)}, dtype_of_sums(a.q));
  }
  return {at::empty_like(a.q), at::empty_like(a.k), at::empty_like(a.v), grad_slopes};
}

AttentionSecondGradients alibi_attention_double_backward_meta(
    const SymbolicAttentionOptions& options,
    const AttentionDoubleBackwardArguments& a) {
  check(arguments::check_attention_double_backward, "posenc::alibi_attention_double_backward", a, options);
  return {at::empty_like(a.q), empty_lse(a.q),      at::empty_like(a.q),
          at::empty_like(a.k), at::empty_like(a.v), at::empty_symint({a.slopes.sym_size(0)}, dtype_of_sums(a.q))};
}

Tensor alibi_attention_slope_sums_meta(const SymbolicAttentionOptions& options, const AttentionSlopeSumsArguments& a) {
  check(arguments::check_attention_slope_sums, "posenc::alibi_attention_slope_sums", a, options);
  return at::empty_symint({4, a.q.sym_size(0), a.q.sym_size(2), a.q.sym_size(1)}, a.q.options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("alibi_attention", AttentionKernel<alibi_attention_meta>::call);
  m.impl("alibi_attention_backward", AttentionKernel<alibi_attention_backward_meta>::call);
  m.impl("alibi_attention_double_backward", AttentionKernel<alibi_attention_double_backward_meta>::call);
  m.impl("alibi_attention_slope_sums", AttentionKernel<alibi_attention_slope_sums_meta>::call);
}

}  // namespace posenc
