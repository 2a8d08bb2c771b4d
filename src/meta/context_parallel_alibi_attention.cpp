#include <arguments/alibi.h>
#include <arguments/context_parallel_alibi_attention.h>
#include <meta/detail/symbolic.h>
#include <ops/context_parallel_alibi_attention.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace posenc {
namespace {

using at::Tensor;
using meta::any_symbolic;

/// Without a look at the group, which may be one of another process while a graph is traced.
constexpr int64_t kAtLeastOneRank = 1;

template <typename Group>
struct Meta {
  static std::tuple<Tensor, Tensor> forward(
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const Tensor& slopes,
      const Group& /*group*/,
      const ContextParallelALiBiAttentionOptions& options) {
    if (!any_symbolic({q, k, v, slopes})) {
      arguments::check_context_parallel_attention(
          "posenc::context_parallel_alibi_attention", {q, k, v, slopes}, options, kAtLeastOneRank);
    }
    const auto wide = q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type()));
    return {at::empty_like(q), at::empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(1)}, wide)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
      const Tensor& grad_out,
      const std::optional<Tensor>& grad_lse,
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const Tensor& slopes,
      const Tensor& out,
      const Tensor& lse,
      const Group& /*group*/,
      const ContextParallelALiBiAttentionOptions& options,
      std::array<bool, 4> grad_mask) {
    if (!any_symbolic({grad_out, q, k, v, slopes, out, lse})) {
      arguments::check_context_parallel_attention_backward(
          "posenc::context_parallel_alibi_attention_backward",
          {grad_out, grad_lse, q, k, v, slopes, out, lse, grad_mask[3]}, options, kAtLeastOneRank);
    }
    const auto like = [](bool wanted, const Tensor& x) { return wanted ? at::empty_like(x) : Tensor(); };
    Tensor grad_slopes;
    if (grad_mask[3]) {
      grad_slopes =
          at::empty_symint({slopes.sym_size(0)}, q.options().dtype(arguments::alibi_slopes_dtype(q.scalar_type())));
    }
    return {like(grad_mask[0], q), like(grad_mask[1], k), like(grad_mask[2], v), grad_slopes};
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  implement_context_parallel_alibi_attention<Meta>(m);
}

}  // namespace posenc
