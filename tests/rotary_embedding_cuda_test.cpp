#include "support.h"

#if POSENC_CUDA

#include "cuda_support.h"
#include "gradcheck.h"

#include <posenc/modules/rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cuda/Sleep.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <thread>
#include <utility>

namespace posenc::test {
namespace {

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

// ---------------------------------------------------------------------------------------------------------------------
// Launches

TEST_F(RotaryEmbeddingCudaGraph, PairIsOneKernel) {
  const RotaryInputs in = inputs();
  EXPECT_EQ(recorded_nodes([&] { rotate_qk(in); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
}

TEST_F(RotaryEmbeddingCudaGraph, StridedPairWithPositionsIsOneKernel) {
  RotaryCase c;
  c.q_strides = c.k_strides = Strides::head_major;
  c.positions = PositionShape::per_batch;
  c.interleaved = true;
  const RotaryInputs in = inputs(c);
  EXPECT_EQ(recorded_nodes([&] { rotate_qk(in); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
}

TEST_F(RotaryEmbeddingCudaGraph, ForwardAndBackwardByAxesAreOneKernelEachAndReplay) {
  for (const PairAxes pair_axes : {PairAxes::chunked, PairAxes::cycled}) {
    RotaryCase c;
    c.head_dim = c.rotary_dim = 128;
    c.positions = PositionShape::per_batch;
    c.axes = 3;
    c.pair_axes = pair_axes;
    RotaryInputs in = inputs(c);
    in.q.requires_grad_();
    in.k.requires_grad_();
    const TensorList cotangents{at::randn_like(in.q), at::randn_like(in.k)};
    TensorList found;
    const auto run = [&] {
      const auto [q, k] = rotate_qk(in);
      found = gradients({q, k}, {in.q, in.k}, cotangents);
    };
    EXPECT_EQ(recorded_nodes(run), (NodeCounts{{cudaGraphNodeTypeKernel, 2}}));
    at::cuda::CUDAGraph graph;
    capture(graph, run);
    in.positions->copy_(in.positions->flip({0, 1, 2}).clone());
    c10::cuda::device_synchronize();
    graph.replay();
    c10::cuda::device_synchronize();
    expect_same_bits(found[0], rotate(backwards(in), cotangents[0]));
    expect_same_bits(found[1], rotate(backwards(in), cotangents[1]));
  }
}

TEST_F(RotaryEmbeddingCudaGraph, ForwardAndBackwardOfThePairAreOneKernelEach) {
  RotaryInputs in = inputs();
  in.q.requires_grad_();
  in.k.requires_grad_();
  const at::Tensor one = at::ones({}, in.q.options());
  const TensorList dense = {at::ones_like(in.q), at::ones_like(in.k)};
  const TensorList expanded = {one.expand_as(in.q), one.expand_as(in.k)};
  for (const TensorList& cotangents : {dense, expanded}) {
    const auto nodes = recorded_nodes([&] {
      const auto [q, k] = rotate_qk(in);
      gradients({q, k}, {in.q, in.k}, cotangents);
    });
    EXPECT_EQ(nodes, (NodeCounts{{cudaGraphNodeTypeKernel, 2}}));
  }
}

TEST_F(RotaryEmbeddingCudaGraph, EmptyTensorsLaunchNothing) {
  for (const int empty : {0, 1, 2}) {
    RotaryCase c;
    c.batch = empty == 0 ? 0 : c.batch;
    c.tokens = empty == 1 ? 0 : c.tokens;
    c.q_heads = c.k_heads = empty == 2 ? 0 : c.q_heads;
    const RotaryInputs in = inputs(c);
    EXPECT_EQ(recorded_nodes([&] { rotate_qk(in); }), NodeCounts()) << c;
  }
}

TEST_F(RotaryEmbeddingCudaGraph, NothingIsAllocatedOutsideTheCachingAllocator) {
  // A capture fails on cudaMalloc, and cudaMallocAsync leaves a node.
  RotaryCase c;
  c.positions = PositionShape::per_batch;
  const RotaryInputs in = leaves(c);
  const NodeCounts nodes = recorded_nodes([&] {
    const auto [q, k] = rotate_qk(in);
    gradients({q, k}, {in.q, in.k, in.cos, in.sin}, {q.detach(), k.detach()});
  });
  EXPECT_EQ(nodes.count(cudaGraphNodeTypeMemAlloc), 0U);
  EXPECT_GE(nodes.at(cudaGraphNodeTypeKernel), 3);
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams, threads, devices

TEST_F(RotaryEmbeddingCuda, RunsOnTheCurrentStream) {
  const RotaryInputs in = inputs();
  const at::Tensor expected = rotate(in, in.q);
  at::Tensor late = at::zeros_like(in.q);
  c10::cuda::device_synchronize();

  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  // `late` is zeros until this stream has copied the values, so work on another stream would read zeros.
  at::cuda::sleep(kLongSleep / 10);
  late.copy_(in.q);
  const at::Tensor y = rotate(in, late);
  stream.synchronize();
  expect_same_bits(y, expected);
}

TEST_F(RotaryEmbeddingCuda, BackwardRunsOnTheStreamOfForward) {
  const RotaryInputs in = leaves();
  const at::Tensor grad = random_tensor(in.q.sizes(), kTarget);
  const TensorList expected = gradients({rotate(in, in.q)}, {in.q, in.cos, in.sin}, {grad});
  at::Tensor late = at::zeros_like(grad);
  c10::cuda::device_synchronize();

  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  const at::Tensor y = rotate(in, in.q);
  at::cuda::sleep(kLongSleep / 10);
  late.copy_(grad);
  const TensorList found = gradients({y}, {in.q, in.cos, in.sin}, {late});
  stream.synchronize();
  for (size_t i = 0; i < found.size(); ++i) {
    expect_same_bits(found[i], expected[i]);
  }
}

TEST_F(RotaryEmbeddingCudaGraph, TheHostDoesNotWait) {
  RotaryCase c;
  c.positions = PositionShape::per_batch;
  const RotaryInputs in = leaves(c);
  const auto run = [&] {
    const auto [q, k] = rotate_qk(in);
    return gradients({q, k}, {in.q, in.k, in.cos, in.sin}, {q.detach(), k.detach()});
  };
  run();
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  stream.synchronize();
  at::cuda::sleep(kLongSleep);
  run();
  // If the host had waited, the stream would be idle by now.
  EXPECT_FALSE(stream.query());
  stream.synchronize();
}

TEST_F(RotaryEmbeddingCuda, ASecondThreadGetsTheSameBits) {
  const RotaryInputs in = leaves();
  const at::Tensor grad = random_tensor(in.q.sizes(), kTarget);
  const auto run = [&]() -> TensorList {
    const at::Tensor y = rotate(in, in.q);
    TensorList results = gradients({y}, {in.q, in.cos, in.sin}, {grad});
    results.push_back(y);
    return results;
  };
  const TensorList expected = run();
  TensorList found;
  std::thread([&] {
    found = run();
    c10::cuda::device_synchronize();
  }).join();
  for (size_t i = 0; i < expected.size(); ++i) {
    expect_same_bits(found[i], expected[i]);
  }
}

TEST_F(RotaryEmbeddingCuda, ADeviceThatIsNotTheCurrentOneWorks) {
  if (c10::cuda::device_count() < 2) {
    GTEST_SKIP() << "needs two CUDA devices";
  }
  const at::Device second(at::kCUDA, 1);
  RotaryCase c;
  c.positions = PositionShape::per_batch;
  RotaryInputs in = inputs(c);
  for (at::Tensor* tensor : {&in.q, &in.k, &in.cos, &in.sin}) {
    *tensor = tensor->to(second).requires_grad_();
  }
  in.positions = in.positions->to(second);
  ASSERT_EQ(c10::cuda::current_device(), 0);
  const at::Tensor y = rotate(in, in.q);
  EXPECT_EQ(y.device(), second);
  expect_close_to_rounding(y, in, in.q);
  const at::Tensor grad = random_tensor(in.q.sizes(), kTarget).to(second);
  const TensorList found = gradients({y}, {in.q, in.cos, in.sin}, {grad});
  EXPECT_EQ(found[0].device(), second);
  expect_table_gradients(found[1], found[2], scalar_table_gradients(in, {{grad, in.q}}));
  EXPECT_EQ(c10::cuda::current_device(), 0);
}

TEST_F(RotaryEmbeddingCuda, TensorsOfTwoDevicesAreAnError) {
  if (c10::cuda::device_count() < 2) {
    GTEST_SKIP() << "needs two CUDA devices";
  }
  RotaryInputs in = inputs();
  in.cos = in.cos.to(at::Device(at::kCUDA, 1));
  expect_error([&] { rotate(in, in.q); }, {"expected cos", "device of x", "cuda:0", "got cuda:1"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs

TEST_F(RotaryEmbeddingCudaGraph, ReplayedForwardRotatesWhatItsInputsHoldNow) {
  for (const PositionShape positions : {PositionShape::absent, PositionShape::per_batch}) {
    RotaryCase c;
    c.positions = positions;
    const RotaryInputs in = inputs(c);
    at::Tensor q;
    at::Tensor k;
    at::cuda::CUDAGraph graph;
    capture(graph, [&] { std::tie(q, k) = rotate_qk(in); });
    in.q.copy_(random_tensor(in.q.sizes(), kTarget));
    in.k.copy_(random_tensor(in.k.sizes(), kTarget));
    if (in.positions) {
      in.positions->copy_(at::zeros_like(*in.positions));
    }
    c10::cuda::device_synchronize();
    graph.replay();
    c10::cuda::device_synchronize();
    const auto [expected_q, expected_k] = rotate_qk(in);
    expect_same_bits(q, expected_q);
    expect_same_bits(k, expected_k);
  }
}

TEST_F(RotaryEmbeddingCudaGraph, ReplayedBackwardGivesTheGradientsOfWhatItsInputsHoldNow) {
  for (const PositionShape positions : {PositionShape::absent, PositionShape::per_batch}) {
    RotaryCase c;
    c.positions = positions;
    const RotaryInputs in = leaves(c);
    const at::Tensor grad_q = random_tensor(in.q.sizes(), kTarget);
    const at::Tensor grad_k = random_tensor(in.k.sizes(), kTarget);
    const auto run = [&] {
      const auto [q, k] = rotate_qk(in);
      return gradients({q, k}, {in.q, in.k, in.cos, in.sin}, {grad_q, grad_k});
    };
    TensorList found;
    at::cuda::CUDAGraph graph;
    capture(graph, [&] { found = run(); });
    {
      const at::NoGradGuard no_grad;
      in.q.copy_(random_tensor(in.q.sizes(), kTarget));
      in.cos.copy_(at::randn(in.cos.sizes()));
      grad_q.copy_(random_tensor(in.q.sizes(), kTarget));
      grad_k.copy_(random_tensor(in.k.sizes(), kTarget));
      if (in.positions) {
        in.positions->copy_(in.positions->flip({0, 1}).clone());
      }
    }
    c10::cuda::device_synchronize();
    graph.replay();
    c10::cuda::device_synchronize();
    const TensorList expected = run();
    for (size_t i = 0; i < expected.size(); ++i) {
      SCOPED_TRACE(i);
      expect_same_bits(found[i], expected[i]);
    }
  }
}

TEST_F(RotaryEmbeddingCudaGraph, ReplayedModuleKeepsItsTablesWhileTheyGrow) {
  posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions(16).max_position_embeddings(8));
  rope->reserve(64, at::Device(at::kCUDA, 0));
  const RotaryInputs in = inputs();
  at::Tensor q;
  at::Tensor k;
  at::cuda::CUDAGraph graph;
  capture(graph, [&] { std::tie(q, k) = rope->forward(in.q, in.k); });
  const auto [expected_q, expected_k] = rope->forward(in.q, in.k);
  rope->reserve(5000, at::Device(at::kCUDA, 0));
  // If the old tables had been freed, the caching allocator would reuse their memory here.
  const at::Tensor rubbish = at::full({64, 8}, 1e9, in.q.options());
  q.zero_();
  k.zero_();
  c10::cuda::device_synchronize();
  graph.replay();
  c10::cuda::device_synchronize();
  expect_same_bits(q, expected_q);
  expect_same_bits(k, expected_k);
}

TEST_F(RotaryEmbeddingCudaGraph, ReplayedModuleKeepsTheTablesOfItsLengthWhileOthersCome) {
  posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions(16).scaling(posenc::DynamicNtkScaling{2, 2}));
  const RotaryInputs in = inputs();
  // Without reserve: the first call of `capture` builds the tables, and the captured call keeps them alive.
  const auto [expected_q, expected_k] = rope->forward(in.q, in.k);
  at::Tensor q;
  at::Tensor k;
  at::cuda::CUDAGraph graph;
  capture(graph, [&] { std::tie(q, k) = rope->forward(in.q, in.k); });
  for (int64_t tokens = 100; tokens < 140; ++tokens) {
    rope->rotate(at::full({1, tokens, 1, 16}, 1e9, in.q.options()));
  }
  q.zero_();
  k.zero_();
  c10::cuda::device_synchronize();
  graph.replay();
  c10::cuda::device_synchronize();
  expect_same_bits(q, expected_q);
  expect_same_bits(k, expected_k);
}

TEST_F(RotaryEmbeddingCudaGraph, CaptureWithoutTablesIsAnErrorThatNamesReserve) {
  posenc::RotaryEmbedding rope(posenc::RotaryEmbeddingOptions(16).max_position_embeddings(8));
  const at::Tensor x = inputs().q;
  const at::Tensor longer = at::zeros({1, 100, 1, 16}, x.options());
  rope->rotate(x);
  std::string message;
  at::Tensor y;
  at::cuda::CUDAGraph graph;
  bool warm = false;
  capture(graph, [&] {
    y = rope->rotate(x);
    if (!std::exchange(warm, true)) {
      return;
    }
    try {
      rope->rotate(longer);
    } catch (const c10::Error& error) {
      message = error.what();
    }
  });
  EXPECT_NE(message.find("call reserve"), std::string::npos) << message;
  graph.replay();
  c10::cuda::device_synchronize();
  expect_same_bits(y, rope->rotate(x));
}

// ---------------------------------------------------------------------------------------------------------------------
// Sizes

TEST_F(RotaryEmbeddingCuda, MoreThan65535OfAnySizeWork) {
  constexpr int64_t kMany = 65'537;
  const auto check = [](const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.batch = c.tokens = c.q_heads = c.k_heads = 1;
    c.head_dim = c.rotary_dim = 4;
    c.spare_rows = 0;
    change(c);
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = inputs(c);
    const auto [q, k] = rotate_qk(in);
    expect_close_to_rounding(q, in, in.q);
    expect_close_to_rounding(k, in, in.k);
  };
  check([](RotaryCase& c) { c.batch = kMany; });
  check([](RotaryCase& c) { c.tokens = kMany; });
  check([](RotaryCase& c) { c.batch = kMany, c.axes = 2, c.positions = PositionShape::per_batch; });
  check([](RotaryCase& c) { c.q_heads = kMany; });
  check([](RotaryCase& c) { c.k_heads = kMany; });
  check([](RotaryCase& c) { c.head_dim = c.rotary_dim = 2 * kMany; });
  check([](RotaryCase& c) { c.packed = true, c.tokens = kMany; });
}

TEST_F(RotaryEmbeddingCuda, TablesOfMoreThan65535RowsHaveGradients) {
  RotaryCase c;
  c.batch = 1;
  c.tokens = 65'537;
  c.q_heads = c.k_heads = 1;
  c.head_dim = c.rotary_dim = 4;
  RotaryInputs in = inputs(c);
  in.cos.requires_grad_();
  in.sin.requires_grad_();
  const at::Tensor grad = random_tensor(in.q.sizes(), kTarget);
  const TensorList found = gradients({rotate(in, in.q)}, {in.cos, in.sin}, {grad});
  // Each row is read by one token, so the expected gradients are the formula in tensor operations.
  const auto half = [](const at::Tensor& x, int64_t i) {
    return x.detach().cpu().to(at::kDouble).view({-1, 2, 2}).select(1, i);
  };
  const at::Tensor dcos = half(grad, 0) * half(in.q, 0) + half(grad, 1) * half(in.q, 1);
  const at::Tensor dsin = half(grad, 1) * half(in.q, 0) - half(grad, 0) * half(in.q, 1);
  const at::Tensor bound = at::full({}, 4 * unit_roundoff(at::kFloat) * 64, at::kDouble);
  expect_within(found[0].narrow(0, 0, c.tokens), dcos, bound);
  expect_within(found[1].narrow(0, 0, c.tokens), dsin, bound);
}

TEST_F(RotaryEmbeddingCuda, MoreThanTwoToThe31ElementsWork) {
  if (const std::string reason = too_large(24); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  constexpr int64_t heads = 16;
  constexpr int64_t head_dim = 128;
  constexpr int64_t tokens = (int64_t{1} << 31) / (heads * head_dim) + 3;
  const Target target{at::kCUDA, at::kBFloat16};
  const auto options = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  for (const bool head_major : {false, true}) {
    SCOPED_TRACE(head_major ? "head major" : "token major");
    at::Tensor x = head_major ? at::empty({1, heads, tokens, head_dim}, options).transpose(1, 2)
                              : at::empty({1, tokens, heads, head_dim}, options);
    ASSERT_GT(x.numel(), int64_t{1} << 31);
    // A block of random tokens, repeated with a prime period that has no common factor with any grid size.
    constexpr int64_t period = 4099;
    const at::Tensor block = random_tensor({1, period, heads, head_dim}, target);
    for (int64_t begin = 0; begin < tokens; begin += period) {
      const int64_t count = std::min(period, tokens - begin);
      x.narrow(1, begin, count).copy_(block.narrow(1, 0, count));
    }
    RotaryInputs in;
    in.cos = at::randn({1009, head_dim / 2}).to(at::kCUDA);
    in.sin = at::randn({1009, head_dim / 2}).to(at::kCUDA);
    const at::Tensor positions = at::arange(tokens, options.dtype(at::kLong)).remainder(1009);
    in.positions = positions;
    x.requires_grad_();
    const at::Tensor y = rotate(in, x);
    const auto expect_rotated = [&](const at::Tensor& actual, const at::Tensor& from, bool conjugate) {
      // First, middle and last tokens; the last are beyond 2^31 elements.
      for (const int64_t begin : {int64_t{0}, tokens / 2 - 8, tokens - 16}) {
        RotaryInputs part = in;
        part.conjugate = conjugate;
        part.positions = positions.narrow(0, begin, 16);
        expect_close_to_rounding(actual.narrow(1, begin, 16), part, from.narrow(1, begin, 16));
      }
    };
    expect_rotated(y, x, false);
    {
      const at::NoGradGuard no_grad;
      RotaryInputs by_axes = in;
      by_axes.positions = positions.expand({3, tokens});
      for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
        by_axes.pair_axes.push_back(pair % 3);
      }
      EXPECT_TRUE(at::equal(rotate(by_axes, x), y));
      at::Tensor in_place = x.detach().clone();
      posenc::rotary_embedding_(in_place, in.cos, in.sin, in.positions);
      EXPECT_TRUE(at::equal(in_place, y));
    }
    const at::Tensor grad = at::ones({}, options).expand_as(y);
    expect_rotated(gradients({y}, {x}, {grad})[0], grad, true);
  }
}

}  // namespace
}  // namespace posenc::test

#else

TEST(RotaryEmbeddingCuda, NeedsABuildWithCuda) {
  posenc::test::require_device(at::kCUDA);
}

#endif
