#include <blockwise/blocks.h>
#include <context_parallel/merged_rows.h>
#if POSENC_CUDA
#include <cuda/detail/attention_parts.h>
#endif

#include <ATen/TensorOperators.h>
#include <ATen/ops/logaddexp.h>

namespace posenc::context_parallel {

using at::Tensor;

void MergedRows::add(const Tensor& out, const Tensor& lse) {
  if (!out_.defined()) {
    out_ = out;
    lse_ = lse;
    return;
  }
#if POSENC_CUDA
  if (out.is_cuda()) {
    std::tie(out_, lse_) = cuda::merge_attention_parts({out_, lse_}, {out, lse});
    return;
  }
#endif
  const auto beside_out = [](const Tensor& x) { return x.transpose(1, 2).unsqueeze(-1); };
  const Tensor total = at::logaddexp(lse_, lse);
  const Tensor sums = blockwise::finite(total);
  out_ = (out_ * beside_out((lse_ - sums).exp_())).addcmul_(out, beside_out((lse - sums).exp_()));
  lse_ = total;
}

}  // namespace posenc::context_parallel
