#pragma once

#include "alibi_support.h"
#include "cuda_support.h"

#include <ATen/ATen.h>

/// Fixtures of the tests of the operators of ALiBi that include CUDA headers.
namespace posenc::test {

/// Tests of behaviour that only GPUs have: streams, graphs, several devices, asynchronous launches.
class AlibiCuda : public ::testing::Test {
 protected:
  void SetUp() override { require_device(at::kCUDA); }

  static constexpr Target kTarget{at::kCUDA, at::kFloat};

  static AlibiInputs inputs(const AlibiCase& c = AlibiCase()) { return make_alibi_inputs(c, kTarget); }

  /// Arguments with scores and slopes that require grad.
  static AlibiInputs leaves(const AlibiCase& c = AlibiCase()) { return with_alibi_grad(inputs(c), true, true); }

  static AlibiCase all_flags() {
    AlibiCase c;
    c.q_len = c.k_len = 40;
    c.causal = c.masked = true;
    c.scale = 0.5;
    return c;
  }
};

/// Tests that need the caching allocator.
class AlibiCudaGraph : public AlibiCuda {
 protected:
  void SetUp() override {
    AlibiCuda::SetUp();
    require_caching_allocator();
  }
};

}  // namespace posenc::test
