#include "alibi_attention_cuda_fixtures.h"
#include "alibi_attention_cuda_support.h"
#include "cuda_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <algorithm>
#include <cmath>
#include <limits>

// Attention by cuDNN of a sequence whose scores do not fit into memory.
namespace posenc::test {
namespace {

class AlibiAttentionCudaLarge : public AlibiAttentionCuda {
 protected:
  static constexpr int64_t kLength = 131072;
  static constexpr int64_t kHeads = 16;

  void SetUp() override {
    AlibiAttentionCuda::SetUp();
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    if (const std::string reason = too_large(16); !reason.empty()) {
      GTEST_SKIP() << reason;
    }
  }

  static AttentionInputs inputs() {
    const auto options = at::TensorOptions(at::kCUDA).dtype(at::kBFloat16);
    AttentionInputs in;
    for (at::Tensor* tensor : {&in.q, &in.k, &in.v}) {
      *tensor = at::randn({1, kLength, kHeads, 128}, options);
    }
    // Slopes from 1, with which only the nearest keys have weight, to 2^-17, with which all keys have.
    in.slopes = at::arange(kHeads, options.dtype(at::kFloat)).mul_(-17.0 / (kHeads - 1)).exp2_();
    in.options.causal(true);
    return in;
  }
};

TEST_F(AlibiAttentionCudaLarge, NeedsMemoryForItsRowsAlone) {
  require_caching_allocator();
  if (IsSkipped()) {
    return;
  }
  const AttentionInputs in = attention_leaves(inputs());
  const at::Tensor grad = at::ones_like(in.q).detach();
  c10::cuda::CUDACachingAllocator::emptyCache();
  const auto device = c10::cuda::current_device();
  const auto allocated = [&] {
    return c10::cuda::CUDACachingAllocator::getDeviceStats(device)
        .allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
  };
  const int64_t before = allocated().current;
  c10::cuda::CUDACachingAllocator::resetPeakStats(device);
  const at::Tensor out = attend(in);
  const TensorList found = gradients({out}, {in.q, in.k, in.v, in.slopes}, {grad});
  const int64_t outputs = static_cast<int64_t>(out.nbytes()) * 4;
  EXPECT_LT(allocated().peak - before - outputs, int64_t{4} << 30);
}

/// Results and gradients of one head of one causal sequence in float64, by blocks of rows.
TensorList head_in_float64(const AttentionInputs& in, const at::Tensor& grad, int64_t head) {
  constexpr int64_t kRows = 512;
  const auto of_head = [&](const at::Tensor& x) { return x.detach().select(2, head).squeeze(0).to(at::kDouble); };
  const at::Tensor q = of_head(in.q);
  const at::Tensor k = of_head(in.k);
  const at::Tensor v = of_head(in.v);
  const at::Tensor dout = of_head(grad);
  const auto slope = in.slopes[head].item<double>();
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(1)));
  const at::Tensor token = at::arange(q.size(0), q.options());
  const at::Tensor out = at::empty_like(q);
  const at::Tensor lse = at::empty_like(token);
  const at::Tensor dq = at::empty_like(q);
  const at::Tensor dk = at::zeros_like(k);
  const at::Tensor dv = at::zeros_like(v);
  const at::Tensor dslope = at::zeros({}, q.options());
  for (int64_t begin = 0; begin < q.size(0); begin += kRows) {
    const int64_t end = std::min(begin + kRows, q.size(0));
    const auto rows = [=](const at::Tensor& x) { return x.slice(0, begin, end); };
    const auto visible = [=](const at::Tensor& x) { return x.slice(0, 0, end); };
    const at::Tensor distance = rows(token).unsqueeze(1) - visible(token);
    at::Tensor p = rows(q).matmul(visible(k).t()).mul_(scale).sub_(distance, slope);
    p.masked_fill_(distance < 0, -std::numeric_limits<double>::infinity());
    rows(lse).copy_(p.logsumexp(1));
    p.sub_(rows(lse).unsqueeze(1)).exp_();
    rows(out).copy_(p.matmul(visible(v)));
    const at::Tensor delta = (rows(dout) * rows(out)).sum(1, /*keepdim=*/true);
    const at::Tensor ds = rows(dout).matmul(visible(v).t()).sub_(delta).mul_(p);
    rows(dq).copy_(ds.matmul(visible(k)).mul_(scale));
    visible(dk).addmm_(ds.t(), rows(q), /*beta=*/1, scale);
    visible(dv).addmm_(p.t(), rows(dout));
    dslope.sub_(ds.mul_(distance).sum());
  }
  return {out, lse, dq, dk, dv, dslope};
}

/// The largest error of a row `[..., D]`, relative to the larger of its norm and the root mean square norm of all rows.
double worst_row(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor error = (actual.detach().to(at::kDouble) - expected).norm(2, -1);
  const at::Tensor norm = expected.norm(2, -1);
  return (error / at::max(norm, norm.square().mean().sqrt())).max().item<double>();
}

TEST_F(AlibiAttentionCudaLarge, IsRight) {
  // A misplaced row has an error of about its norm. The worst rounding error of so many rows is a few times the mean.
  constexpr double kOfWorstRow = 4;
  const AttentionInputs in = inputs();
  // With the output as its own gradient, the terms of slope gradients have one sign on average. They do not cancel, so
  // the relative error is meaningful.
  const at::Tensor grad = attend(in).detach();
  const TensorList actual = everything(in, grad);
  // Decoding: one query, the last token.
  AttentionInputs last = in;
  last.q = in.q.narrow(1, kLength - 1, 1);
  const at::Tensor decoded = attend(last);
  for (const int64_t head : {int64_t{0}, int64_t{7}, kHeads - 1}) {
    SCOPED_TRACE(::testing::Message() << "head " << head);
    const TensorList expected = head_in_float64(in, grad, head);
    for (size_t i = 0; i < expected.size(); ++i) {
      SCOPED_TRACE(kNames[i]);
      const bool of_rows = expected[i].dim() == 2;  // [B, S, H, D]; lse is [B, H, S], dslopes [H]
      const at::Tensor found = of_rows ? actual[i].select(2, head).squeeze(0)
          : expected[i].dim() == 1     ? actual[i].select(1, head).squeeze(0)
                                       : actual[i][head];
      EXPECT_LE(relative_error(found, expected[i]), tolerance(i, at::kBFloat16));
      if (of_rows) {
        EXPECT_LE(worst_row(found, expected[i]), kOfWorstRow * tolerance(i, at::kBFloat16));
      }
    }
    const at::Tensor found = decoded.select(2, head).squeeze(0);
    EXPECT_LE(relative_error(found, expected[0].slice(0, kLength - 1)), kOfWorstRow * tolerance(0, at::kBFloat16))
        << "decoding";
  }
}

}  // namespace
}  // namespace posenc::test
