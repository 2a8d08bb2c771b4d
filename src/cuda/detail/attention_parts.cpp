#include <cuda/detail/attention_options.h>
#include <cuda/detail/attention_parts.h>
#include <cuda/detail/dtype.h>
#include <cuda/detail/launch.h>
#include <cuda/kernels.h>

#include <c10/cuda/CUDAGuard.h>

namespace posenc::cuda {
namespace {

using at::Tensor;

/// Sets the sizes of a problem to those of its result, `[B, S, H, D]`.
template <typename Problem>
void set_sizes(Problem& p, const Tensor& result) {
  TORCH_CHECK(
      result.size(0) <= kMaxGridY && result.size(2) <= kMaxGridY,
      "posenc::context_parallel_alibi_attention: expected at most ", kMaxGridY, " sequences and heads, got ",
      result.sizes());
  p.batch = static_cast<int32_t>(result.size(0));
  p.rows = static_cast<int32_t>(result.size(1));
  p.heads = static_cast<int32_t>(result.size(2));
  p.head_dim = static_cast<int32_t>(result.size(3));
}

/// Strides of a tensor with dense channels.
HeadStrides dense_strides(const Tensor& x) {
  TORCH_INTERNAL_ASSERT(x.stride(3) == 1 || x.size(3) == 1, "channels of strides ", x.strides());
  return head_strides(x);
}

PartRows part_of(const AttentionPart& part) {
  return {part.out.const_data_ptr(), dense_strides(part.out), part.lse.const_data_ptr(), row_strides(part.lse)};
}

}  // namespace

void merge_attention_parts(const AttentionPart& first, const AttentionPart& second, const AttentionPart& result) {
  if (result.out.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAGuard device(result.out.device());
  MergePartsProblem p{};
  set_sizes(p, result.out);
  p.first = part_of(first);
  p.second = part_of(second);
  p.out = result.out.mutable_data_ptr();
  p.out_strides = dense_strides(result.out);
  p.lse = result.lse.mutable_data_ptr();
  p.lse_strides = row_strides(result.lse);
  merge_parts(
      p, dtype_of(first.out.scalar_type()), dtype_of(second.out.scalar_type()), dtype_of(result.out.scalar_type()));
}

void sum_attention_parts(at::ArrayRef<Tensor> terms, at::ScalarType dtype, const Tensor& result) {
  if (result.numel() == 0) {
    return;
  }
  const c10::cuda::CUDAGuard device(result.device());
  SumPartsProblem p{};
  set_sizes(p, result);
  TORCH_INTERNAL_ASSERT(terms.size() <= kMostSumTerms, terms.size(), " terms");
  for (const Tensor& term : terms) {
    p.terms[p.count++] = {term.const_data_ptr(), dense_strides(term), term.scalar_type() != dtype};
  }
  p.out = result.mutable_data_ptr();
  p.out_strides = dense_strides(result);
  sum_parts(p, dtype_of(dtype), dtype_of(result.scalar_type()));
}

}  // namespace posenc::cuda
