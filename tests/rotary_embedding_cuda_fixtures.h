#pragma once

#include "cuda_support.h"
#include "support.h"

#include <ATen/ATen.h>

/// Fixtures of the tests of rotary_embedding that include CUDA headers.
namespace posenc::test {

/// Tests of behaviour that only GPUs have: streams, graphs, several devices, asynchronous launches.
class RotaryEmbeddingCuda : public ::testing::Test {
 protected:
  void SetUp() override { require_device(at::kCUDA); }

  static constexpr Target kTarget{at::kCUDA, at::kFloat};

  static RotaryInputs inputs(const RotaryCase& c = RotaryCase()) { return make_inputs(c, kTarget); }

  /// Arguments of which all floating-point tensors require grad.
  static RotaryInputs leaves(const RotaryCase& c = RotaryCase()) {
    RotaryInputs in = inputs(c);
    for (at::Tensor* tensor : {&in.q, &in.k, &in.cos, &in.sin}) {
      *tensor = tensor->detach().requires_grad_();
    }
    return in;
  }
};

/// Tests that need the caching allocator.
class RotaryEmbeddingCudaGraph : public RotaryEmbeddingCuda {
 protected:
  void SetUp() override {
    RotaryEmbeddingCuda::SetUp();
    require_caching_allocator();
  }
};

}  // namespace posenc::test
