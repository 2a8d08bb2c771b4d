#include "alibi_attention_cuda_fixtures.h"
#include "alibi_attention_cuda_support.h"
#include "cuda_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <cmath>
#include <limits>
#include <thread>

// Fused attention by cuDNN. For some graphs cuDNN silently returns wrong results, so both passes of every form of graph
// that the library builds are compared with float64.
namespace posenc::test {
namespace {

class AlibiAttentionForms : public ::testing::TestWithParam<std::tuple<at::ScalarType, AttentionCase>> {
 protected:
  void SetUp() override { require_fused(); }
};

TEST_P(AlibiAttentionForms, AreFusedAndRight) {
  const auto& [dtype, c] = GetParam();
  const AttentionInputs in = make_attention_inputs(c, {at::kCUDA, dtype});
  const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
  TensorList actual;
  EXPECT_EQ(logged([&] { actual = everything(in, grad); }).find(kNotFused), std::string::npos);
  expect_everything_right(c, in, grad, actual);
}

INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiAttentionForms,
    ::testing::Combine(::testing::Values(at::kBFloat16, at::kHalf), ::testing::ValuesIn(attention_forms())),
    attention_form_name);

TEST_F(AlibiAttentionCudaGraphs, ForwardPassIsOneKernel) {
  const AttentionInputs in = inputs(training());
  // Other nodes are allowed: cuDNN may clear its workspace.
  EXPECT_EQ(recorded_nodes([&] { attend(in); })[cudaGraphNodeTypeKernel], 1);
}

TEST_F(AlibiAttentionCuda, NeverBuildsAPlanTwice) {
  AttentionCase c = training();
  c.q_len = c.k_len = 333;  // a length that no other test uses
  const AttentionInputs in = inputs(c);
  const at::Tensor grad = at::ones_like(in.q);
  const std::string first = logged([&] { everything(in, grad); });
  EXPECT_NE(first.find("plan for the forward pass"), std::string::npos);
  EXPECT_NE(first.find("plan for the backward pass"), std::string::npos);
  EXPECT_EQ(logged([&] { everything(in, grad); }).find("plan for"), std::string::npos);
}

TEST_F(AlibiAttentionCuda, MorePlansThanAreKeptAreRight) {
  AttentionCase c;
  c.head_dim = 64;
  c.causal = true;
  const auto result_of = [&](int64_t length) {
    at::manual_seed(length);
    c.q_len = c.k_len = length;
    return attend(inputs(c));
  };
  const at::Tensor first = result_of(64);
  for (int64_t length = 65; length < 64 + 150; ++length) {
    result_of(length);
  }
  expect_same_bits(result_of(64), first);
}

TEST_F(AlibiAttentionCudaGraphs, PlansAreNotBuiltWhileAGraphIsCaptured) {
  AttentionCase c = training();
  c.q_len = c.k_len = 335;  // a length that no other test uses
  const AttentionInputs in = attention_leaves(inputs(c));
  const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool());
  const auto expect_refused = [&](const std::function<void()>& action) {
    at::cuda::CUDAGraph graph;
    graph.capture_begin();
    expect_error(action, {"posenc::alibi_attention: ", "plan", "once before the capture"});
    graph.capture_end();
  };
  expect_refused([&] { attend(in); });
  const at::Tensor out = attend(in);
  const at::Tensor grad = at::ones_like(in.q);
  expect_refused([&] { gradients({out}, {in.q}, {grad}); });
}

TEST_F(AlibiAttentionCudaGraphs, GraphsReplayAfterManyOtherShapes) {
  AttentionCase c = training();
  c.q_len = c.k_len = 337;  // a length that no other test uses
  const AttentionInputs leaves = attention_leaves(inputs(c));
  const at::Tensor grad = at::randn(leaves.q.sizes(), at::kFloat).to(leaves.q.options());
  const auto both_passes = [&] {
    const at::Tensor out = attend(leaves);
    TensorList results = gradients({out}, {leaves.q, leaves.k, leaves.v, leaves.slopes}, {grad});
    results.push_back(out);
    return results;
  };
  TensorList recorded;
  at::cuda::CUDAGraph graph;
  capture(graph, [&] { recorded = both_passes(); });
  AttentionCase other = c;
  other.q_heads = other.k_heads = 1;
  other.batch = 1;
  for (int64_t length = 400; length < 400 + 150; ++length) {
    other.q_len = other.k_len = length;
    const AttentionInputs in = attention_leaves(inputs(other));
    const at::Tensor out = attend(in);
    gradients({out}, {in.q}, {at::ones_like(out)});
  }
  const TensorList expected = both_passes();
  {
    const at::NoGradGuard no_grad;
    for (const at::Tensor& result : recorded) {
      result.fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }
  graph.replay();
  c10::cuda::device_synchronize();
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LE(relative_error(recorded[i], expected[i]), unit_roundoff(at::kBFloat16)) << i;
  }
}

/// Slopes that begin at any element, like the slices of a parameter in tensor parallelism.
TEST_F(AlibiAttentionCuda, SlopesNeedNoAlignmentBeyondTheirOwn) {
  for (const bool causal : {false, true}) {
    AttentionCase c = training();
    c.causal = causal;
    AttentionInputs in = inputs(c);
    const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
    const TensorList expected = everything_in_float64(in, grad);
    for (int64_t begin = 1; begin < 4; ++begin) {
      in.slopes = at::cat({at::zeros({begin}, in.slopes.options()), in.slopes}).slice(0, begin);
      const TensorList actual = everything(in, grad);
      for (size_t i = 0; i < actual.size(); ++i) {
        EXPECT_LE(relative_error(actual[i], expected[i]), tolerance(i, in.q.scalar_type())) << kNames[i];
      }
    }
  }
}

TEST_F(AlibiAttentionCudaGraphs, GraphsReplayForwardAndBackward) {
  const AttentionInputs in = inputs(training());
  const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
  const AttentionInputs leaves = attention_leaves(in);
  TensorList recorded;
  at::cuda::CUDAGraph graph;
  capture(graph, [&] {
    const at::Tensor out = attend(leaves);
    recorded = gradients({out}, {leaves.q, leaves.k, leaves.v}, {grad});
    recorded.push_back(out);
  });
  {
    const at::NoGradGuard no_grad;
    leaves.q.copy_(at::randn(in.q.sizes(), at::kFloat));
  }
  graph.replay();
  c10::cuda::device_synchronize();
  const at::Tensor out = attend(leaves);
  TensorList expected = gradients({out}, {leaves.q, leaves.k, leaves.v}, {grad});
  expected.push_back(out);
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_LE(relative_error(recorded[i], expected[i]), unit_roundoff(at::kBFloat16)) << i;
  }
  expect_same_bits(recorded.back(), out);
}

/// Sums over a part of the keys, with the lse of more keys. float64 is computed in blocks of matrix products.
TEST_F(AlibiAttentionCuda, SumsForTheSlopesAreThoseOfFloat64) {
  AttentionCase c;
  c.q_len = c.k_len = 448;
  for (const int64_t head_dim : {64, 128, 256}) {
    for (const int64_t offset : {0, 448, -448, 100'000}) {
      for (const bool causal : {false, true}) {
        if (causal && offset < 0) {
          continue;  // no query sees a key
        }
        SCOPED_TRACE(c10::str("D ", head_dim, ", offset ", offset, causal ? ", causal" : ""));
        c.head_dim = head_dim;
        c.causal = causal;
        c.query_offset = offset;
        c.largest_slope = offset == 100'000 ? 0x1p-12 : 0.5;
        const AttentionInputs in = inputs(c);
        const AttentionInputs wide = in_float64(in);
        const at::Tensor lse = std::get<1>(attend_with_lse(wide)).add(1);
        const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
        at::Tensor actual;
        const std::string text = logged([&] { actual = slope_sums(in, grad, lse.to(at::kFloat)); });
        EXPECT_EQ(text.find(kNotFused), std::string::npos);
        const at::Tensor expected = slope_sums(wide, grad.to(at::kDouble), lse);
        // Exponents have the rounding errors of dot products and of slope * distance in float32.
        const double largest = c.largest_slope * static_cast<double>(std::abs(offset) + c.q_len);
        for (int64_t sum = 0; sum < 4; ++sum) {
          EXPECT_LE(relative_error(actual[sum], expected[sum]), (64 + 4 * largest) * unit_roundoff(at::kFloat)) << sum;
        }
      }
    }
  }
}

TEST_F(AlibiAttentionCuda, DeterministicAlgorithmsGiveTheSameBits) {
  for (const bool causal : {false, true}) {
    AttentionCase c = training();
    c.causal = causal;
    c.q_len = c.k_len = 1024;
    const AttentionInputs in = inputs(c);
    const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
    const bool before = at::globalContext().deterministicAlgorithms();
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);
    const TensorList first = everything(in, grad);
    for (int repeat = 0; repeat < 5; ++repeat) {
      const TensorList again = everything(in, grad);
      for (size_t i = 0; i < first.size(); ++i) {
        expect_same_bits(again[i], first[i]);
      }
    }
    at::globalContext().setDeterministicAlgorithms(before, /*warn_only=*/false);
  }
}

TEST_F(AlibiAttentionCuda, ThreadsShareThePlans) {
  AttentionCase c = training();
  c.q_len = c.k_len = 271;  // a length that no other test uses
  const AttentionInputs in = inputs(c);
  std::vector<at::Tensor> results(4);
  c10::cuda::device_synchronize();
  std::vector<std::thread> threads;
  threads.reserve(results.size());
  for (at::Tensor& result : results) {
    threads.emplace_back([&] {
      const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
      for (int i = 0; i < 20; ++i) {
        result = attend(in);
      }
      c10::cuda::getCurrentCUDAStream().synchronize();
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  const at::Tensor expected = attend(in);
  for (const at::Tensor& result : results) {
    expect_same_bits(result, expected);
  }
}

TEST_F(AlibiAttentionCuda, SwitchedOffCudnnIsNotAsked) {
  const AttentionInputs in = inputs(training());
  const at::Tensor fused = attend(in);
  at::globalContext().setUserEnabledCuDNN(false);
  at::Tensor plain;
  const std::string said = logged([&] { plain = attend(in); });
  at::globalContext().setUserEnabledCuDNN(true);
  EXPECT_NE(said.find(kTiled), std::string::npos);
  EXPECT_LE(relative_error(fused, plain), 2 * unit_roundoff(at::kBFloat16));
}

TEST_F(AlibiAttentionCuda, ExpandedGradientsAreRight) {
  const AttentionInputs in = attention_leaves(inputs(training()));
  const at::Tensor out = attend(in);
  const TensorList of_sum = torch::autograd::grad({out.sum()}, {in.q, in.k, in.v}, {}, /*retain_graph=*/true);
  const TensorList expected = everything_in_float64(in, at::ones_like(out));
  for (size_t i = 0; i < of_sum.size(); ++i) {
    EXPECT_LE(relative_error(of_sum[i], expected[i + 2]), tolerance(i + 2, at::kBFloat16)) << kNames[i + 2];
  }
}

TEST_F(AlibiAttentionCuda, LengthsBeyondTheTensorsGiveNaNForTheirSequence) {
  AttentionCase c = training();
  c.q_len = c.k_len = 65;
  AttentionInputs in = inputs(c);
  in.options.query_offset(0).seqlens_k(at::tensor({66, 30}, at::kInt).cuda());
  at::Tensor out;
  EXPECT_EQ(logged([&] { out = attend(in); }).find(kNotFused), std::string::npos);
  EXPECT_TRUE(out[0].isnan().all().item<bool>());
  EXPECT_FALSE(out[1].isnan().any().item<bool>());
}

TEST_F(AlibiAttentionCuda, GradientOfSlopesIsTheSameBitsEveryTime) {
  const AttentionInputs in = attention_leaves(inputs(training()));
  const at::Tensor out = attend(in);
  const at::Tensor grad = at::ones_like(out);
  const at::Tensor first = gradients({out}, {in.slopes}, {grad})[0];
  for (int repeat = 0; repeat < 5; ++repeat) {
    expect_same_bits(gradients({out}, {in.slopes}, {grad})[0], first);
  }
}

TEST_F(AlibiAttentionCuda, WhatCudnnCannotReadIsComputedByTheKernelsOfThisLibrary) {
  AttentionCase c = training();
  c.q_len = c.k_len = 65;
  for (const Strides strides : {Strides::odd_offset, Strides::every_other, Strides::one_token}) {
    c.strides = strides;
    const AttentionInputs in = inputs(c);
    at::Tensor out;
    EXPECT_NE(logged([&] { out = attend(in); }).find(kTiled), std::string::npos);
    const ScalarAttention expected = scalar_attention(
        in, at::zeros_like(out), at::zeros({c.batch, c.q_heads, c.q_len}), unit_roundoff(out.scalar_type()));
    expect_within(out, expected.values.out, expected.bounds.out);
  }
}

/// The error is at most 1.5 times that of at::scaled_dot_product_attention without a bias, in the same dtype.
TEST_F(AlibiAttentionCuda, IsAsExactAsAttentionWithoutBias) {
  for (const int64_t length : {257, 2048, 8192}) {
    for (const bool causal : {false, true}) {
      AttentionCase c = training();
      c.batch = 1;
      c.q_heads = c.k_heads = 2;
      c.q_len = c.k_len = length;
      c.causal = causal;
      const AttentionInputs in = inputs(c);
      const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
      AttentionInputs without = attention_leaves(in);
      const at::Tensor plain = at::scaled_dot_product_attention(
                                   without.q.transpose(1, 2), without.k.transpose(1, 2), without.v.transpose(1, 2),
                                   /*attn_mask=*/{}, /*dropout_p=*/0, causal)
                                   .transpose(1, 2);
      TensorList theirs = gradients({plain}, {without.q, without.k, without.v}, {grad});
      theirs.insert(theirs.begin(), plain);
      AttentionInputs zero = in;
      zero.slopes = at::zeros_like(in.slopes);
      const TensorList their_truth = everything_in_float64(zero, grad);
      AttentionInputs steep = in;
      steep.slopes = at::tensor({1.0F, 0.03125F}, in.slopes.options());
      const TensorList ours = everything(steep, grad);
      const TensorList our_truth = everything_in_float64(steep, grad);
      for (const auto& [theirs_at, ours_at] : {std::pair(0, 0), std::pair(1, 2), std::pair(2, 3), std::pair(3, 4)}) {
        const auto t = static_cast<size_t>(theirs_at);
        const auto o = static_cast<size_t>(ours_at);
        EXPECT_LE(relative_error(ours[o], our_truth[o]), 1.5 * relative_error(theirs[t], their_truth[o]))
            << kNames[o] << " at " << length << (causal ? ", causal" : "");
      }
      EXPECT_LE(relative_error(ours[5], our_truth[5]), 0.01) << "dslopes at " << length;
    }
  }
}

}  // namespace
}  // namespace posenc::test
