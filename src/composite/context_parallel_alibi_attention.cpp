#include <ops/context_parallel_alibi_attention.h>
#ifdef USE_DISTRIBUTED
#include <context_parallel/alibi_attention.h>
#include <context_parallel/ring.h>
#endif

#include <torch/library.h>

// One implementation for all devices: tensor operations, the operators of attention and the collectives of the group.
namespace posenc {
namespace {

using at::Tensor;

constexpr const char* kForward = "posenc::context_parallel_alibi_attention";
constexpr const char* kBackward = "posenc::context_parallel_alibi_attention_backward";

#ifndef USE_DISTRIBUTED
/// Takes the arguments, which nothing else does then.
template <typename... Arguments>
[[noreturn]] void refuse(const char* op, const Arguments&... /*arguments*/) {
  TORCH_CHECK(false, op, ": expected a LibTorch with process groups, got one that was built without c10d");
}
#endif

template <typename Group>
struct Composite {
  static std::tuple<Tensor, Tensor> forward(
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const Tensor& slopes,
      const Group& group,
      const ContextParallelALiBiAttentionOptions& options) {
#ifdef USE_DISTRIBUTED
    return context_parallel::alibi_attention(
        q, k, v, slopes, context_parallel::process_group(kForward, group), options);
#else
    refuse(kForward, q, k, v, slopes, group, options);
#endif
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
      const Group& group,
      const ContextParallelALiBiAttentionOptions& options,
      std::array<bool, 4> grad_mask) {
#ifdef USE_DISTRIBUTED
    return context_parallel::alibi_attention_backward(
        grad_out, grad_lse, q, k, v, slopes, out, lse, context_parallel::process_group(kBackward, group), options,
        grad_mask);
#else
    refuse(kBackward, grad_out, grad_lse, q, k, v, slopes, out, lse, group, options, grad_mask);
#endif
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeExplicitAutograd, m) {
  implement_context_parallel_alibi_attention<Composite>(m);
}

}  // namespace posenc
