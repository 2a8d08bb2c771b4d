#include <cuda/detail/attention_options.h>
#include <cuda/detail/attention_parts.h>
#include <cuda/detail/dtype.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

namespace posenc::cuda {

using at::Tensor;

std::tuple<Tensor, Tensor> merge_attention_parts(const AttentionPart& first, const AttentionPart& second) {
  const c10::cuda::CUDAGuard device(second.out.device());
  const Tensor& like = second.out;
  Tensor out = at::empty(like.sizes(), second.lse.options());
  Tensor lse = at::empty(second.lse.sizes(), second.lse.options());
  if (out.numel() > 0) {
    TORCH_CHECK(
        like.size(0) <= kMaxGridY && like.size(2) <= kMaxGridY,
        "posenc::context_parallel_alibi_attention: expected at most ", kMaxGridY, " sequences and heads, got q of ",
        like.sizes());
    const auto part_of = [](const AttentionPart& part) {
      const bool dense = part.out.stride(3) == 1 || part.out.size(3) == 1;
      TORCH_INTERNAL_ASSERT(dense, "channels of strides ", part.out.strides());
      return AttentionPartRows{
          part.out.const_data_ptr(), head_strides(part.out), part.lse.const_data_ptr(), row_strides(part.lse)};
    };
    AttentionPartsProblem p{};
    p.first = part_of(first);
    p.second = part_of(second);
    p.out = out.mutable_data_ptr();
    p.lse = lse.mutable_data_ptr();
    p.batch = static_cast<int32_t>(like.size(0));
    p.rows = static_cast<int32_t>(like.size(1));
    p.heads = static_cast<int32_t>(like.size(2));
    p.head_dim = static_cast<int32_t>(like.size(3));
    attention_parts(p, dtype_of(first.out.scalar_type()), dtype_of(like.scalar_type()));
  }
  return {out, lse};
}

}  // namespace posenc::cuda
