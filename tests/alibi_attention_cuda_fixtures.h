#pragma once

#include "alibi_attention_support.h"
#include "cuda_support.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>

/// Fixtures of tests of attention by cuDNN. Includes CUDA headers.
namespace posenc::test {

#if POSENC_CUDNN
constexpr bool kBuiltWithCudnn = true;
#else
constexpr bool kBuiltWithCudnn = false;
#endif

/// Skips if attention cannot be fused. alibi_attention_test.cpp tests attention that is not fused.
inline void require_fused() {
  require_device(at::kCUDA);
  if (::testing::Test::IsSkipped() || ::testing::Test::HasFatalFailure()) {
    return;
  }
  const auto* device = at::cuda::getCurrentDeviceProperties();
  if (!kBuiltWithCudnn) {
    GTEST_SKIP() << "built without cuDNN";
  }
  if (device->major != 9 || device->minor != 0) {
    GTEST_SKIP() << "attention is fused on compute capability 9.0 only";
  }
}

class AlibiAttentionCuda : public ::testing::Test {
 protected:
  void SetUp() override { require_fused(); }

  static AttentionCase training() {
    AttentionCase c;
    c.q_len = c.k_len = 448;
    c.head_dim = 128;
    c.causal = true;
    return c;
  }

  static AttentionInputs inputs(const AttentionCase& c) { return make_attention_inputs(c, {at::kCUDA, at::kBFloat16}); }
};

/// Tests that capture a CUDA graph. Only the caching allocator can allocate during a capture.
class AlibiAttentionCudaGraphs : public AlibiAttentionCuda {
 protected:
  void SetUp() override {
    AlibiAttentionCuda::SetUp();
    require_caching_allocator();
  }
};

}  // namespace posenc::test
