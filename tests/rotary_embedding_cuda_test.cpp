#include "support.h"

#if POSENC_CUDA

#include "gradcheck.h"
#include "rotary_embedding_cuda_fixtures.h"

#include <posenc/modules/rotary_embedding.h>

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

}  // namespace
}  // namespace posenc::test

#else

TEST(RotaryEmbeddingCuda, NeedsABuildWithCuda) {
  posenc::test::require_device(at::kCUDA);
}

#endif
