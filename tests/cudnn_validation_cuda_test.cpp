#include "alibi_attention_cuda_support.h"
#include "support.h"

#include <cuda/detail/cudnn_validation.h>
#include <posenc/attention.h>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <gtest/gtest.h>

namespace posenc::test {
namespace {

using cuda::CudnnBias;
using cuda::CudnnForm;
using cuda::CudnnMask;

/// For the whole process: the variable is read once.
const ScopedEnv kForced("POSENC_VALIDATE_CUDNN", "1");  // NOLINT(cert-err58-cpp)

constexpr CudnnForm kCausal{at::kBFloat16, 64, CudnnBias::ramp, CudnnMask::causal, false, false, false, false};

class CudnnValidationCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    require_device(at::kCUDA);
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    const auto* const device = at::cuda::getCurrentDeviceProperties();
    if (device->major != 9 || device->minor != 0) {
      GTEST_SKIP() << "which forms are right is known for cuDNN on compute capability 9.0 only";
    }
  }
};

TEST_F(CudnnValidationCuda, FormsThatAreUsedAreRight) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16}) {
    for (const bool grouped : {false, true}) {
      const auto form = [&](CudnnBias bias, CudnnMask mask, bool offset, bool limits) {
        return CudnnForm{dtype, 128, bias, mask, offset, limits, grouped, /*deterministic=*/false};
      };
      EXPECT_EQ(why_wrong(form(CudnnBias::none, CudnnMask::none, false, false)), "");
      EXPECT_EQ(why_wrong(form(CudnnBias::none, CudnnMask::causal, false, false)), "");
      EXPECT_EQ(why_wrong(form(CudnnBias::none, CudnnMask::causal_bottom_right, false, false)), "");
      EXPECT_EQ(why_wrong(form(CudnnBias::ramp, CudnnMask::causal, false, false)), "");
      EXPECT_EQ(why_wrong(form(CudnnBias::ramp, CudnnMask::causal, false, true)), "");
      EXPECT_EQ(why_wrong(form(CudnnBias::ramp, CudnnMask::causal_bottom_right, true, false)), "");
      EXPECT_EQ(why_wrong(form(CudnnBias::distance, CudnnMask::none, false, false)), "");
      EXPECT_EQ(why_wrong(form(CudnnBias::distance, CudnnMask::none, true, true)), "");
    }
  }
}

/// With one limit for each sequence cuDNN's results are wrong, without an error (seen with 9.19).
TEST_F(CudnnValidationCuda, AFormThatCudnnComputesWrongIsFound) {
  const int64_t version = at::detail::getCUDAHooks().versionCuDNN();
  if (version / 100 != 919) {
    GTEST_SKIP() << "seen with cuDNN 9.19 only, this is " << version;
  }
  CudnnForm form{at::kBFloat16, 128, CudnnBias::distance, CudnnMask::none, false, /*key_limits=*/true, false, false};
  form.limits_of_sequences = true;
  const std::string reason = why_wrong(form);
  EXPECT_NE(reason.find("the error of "), std::string::npos) << reason;
}

/// A ramp is the bias of ALiBi only where a mask hides the keys after a query.
TEST_F(CudnnValidationCuda, AFormWithAnotherBiasIsFound) {
  const CudnnForm form{at::kHalf, 128, CudnnBias::ramp, CudnnMask::none, false, false, false, false};
  const std::string reason = why_wrong(form);
  EXPECT_NE(reason.find("the error of the output is "), std::string::npos) << reason;
}

TEST_F(CudnnValidationCuda, TheFirstUseOfAFormIsLoggedOnce) {
  const auto options = at::dtype(kCausal.dtype).device(at::kCUDA);
  const at::Tensor q = at::randn({1, 128, 2, kCausal.head_dim}, options);
  const at::Tensor slopes = at::full({2}, 0.5, options.dtype(at::kFloat));
  const auto run = [&] { attention(q, q, q, AttentionOptions().slopes(slopes).causal(true)); };
  const std::string first = logged(run);
  EXPECT_NE(first.find("a ramp, a causal mask: validated, used from now on"), std::string::npos) << first;
  EXPECT_EQ(logged(run).find("validated"), std::string::npos);
}

}  // namespace
}  // namespace posenc::test
