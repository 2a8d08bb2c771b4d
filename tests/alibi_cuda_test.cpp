#include "alibi_support.h"

#if POSENC_CUDA

#include "alibi_cuda_fixtures.h"
#include "gradcheck.h"

#include <posenc/modules/alibi_bias.h>

#include <ATen/ATen.h>
#include <ATen/cuda/Sleep.h>

#include <thread>

namespace posenc::test {
namespace {

/// Results and gradients of all operators.
TensorList everything(const AlibiInputs& in, const at::Tensor& grad) {
  TensorList results;
  const at::Tensor bias = bias_of(in, at::kFloat);
  results.push_back(bias.detach());
  results.push_back(gradients({bias}, {in.slopes}, {grad.select(0, 0)})[0]);
  for (const at::Tensor& y : {add_of(in), softmax_of(in)}) {
    results.push_back(y.detach());
    for (const at::Tensor& gradient : gradients({y}, {in.scores, in.slopes}, {grad})) {
      results.push_back(gradient);
    }
  }
  return results;
}

void expect_all_same_bits(const TensorList& actual, const TensorList& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    SCOPED_TRACE(i);
    expect_same_bits(actual[i], expected[i]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches

const NodeCounts kOneKernel{{cudaGraphNodeTypeKernel, 1}};

TEST_F(AlibiCudaGraph, EveryForwardIsOneKernel) {
  for (const Strides strides : {Strides::dense, Strides::head_major, Strides::reversed, Strides::odd_offset}) {
    AlibiCase c = all_flags();
    c.strides = strides;
    const AlibiInputs in = inputs(c);
    EXPECT_EQ(recorded_nodes([&] { bias_of(in, at::kHalf); }), kOneKernel);
    EXPECT_EQ(recorded_nodes([&] { add_of(in); }), kOneKernel);
    EXPECT_EQ(recorded_nodes([&] { softmax_of(in); }), kOneKernel);
    at::Tensor scores = in.scores;
    EXPECT_EQ(recorded_nodes([&] { posenc::alibi_add_(scores, in.slopes); }), kOneKernel);
  }
}

TEST_F(AlibiCudaGraph, SoftmaxOfAnyRowLengthIsOneKernel) {
  for (const int64_t keys : {1, 1024, 2048, 16384}) {
    AlibiCase c;
    c.k_len = keys;
    const AlibiInputs in = inputs(c);
    EXPECT_EQ(recorded_nodes([&] { softmax_of(in); }), kOneKernel) << keys;
  }
}

TEST_F(AlibiCudaGraph, GradientOfTheSumToScoresIsNoKernel) {
  const AlibiInputs in = with_alibi_grad(inputs(), true, false);
  const at::Tensor one = at::ones({}, in.scores.options());
  for (const at::Tensor& grad : {at::ones_like(in.scores).detach(), one.detach().expand_as(in.scores)}) {
    // The only kernel is that of the forward pass.
    EXPECT_EQ(recorded_nodes([&] { gradients({add_of(in)}, {in.scores}, {grad}); }), kOneKernel);
    const AlibiInputs learnable = with_alibi_grad(in, true, true);
    EXPECT_EQ(recorded_nodes([&] { gradients({add_of(learnable)}, {learnable.scores}, {grad}); }).size(), 1U);
  }
}

TEST_F(AlibiCudaGraph, GradientsToScoresAreOneKernelEach) {
  AlibiCase c = all_flags();
  const AlibiInputs in = with_alibi_grad(inputs(c), true, false);
  const at::Tensor grad = at::ones_like(in.scores).detach();
  const NodeCounts two{{cudaGraphNodeTypeKernel, 2}};
  EXPECT_EQ(recorded_nodes([&] { gradients({add_of(in)}, {in.scores}, {grad}); }), two);
  EXPECT_EQ(recorded_nodes([&] { gradients({softmax_of(in)}, {in.scores}, {grad}); }), two);
}

TEST_F(AlibiCudaGraph, NothingIsAllocatedOutsideTheCachingAllocator) {
  // A capture fails on cudaMalloc, and cudaMallocAsync leaves a node.
  const AlibiInputs in = leaves(all_flags());
  const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
  const NodeCounts nodes = recorded_nodes([&] { everything(in, grad); });
  EXPECT_EQ(nodes.count(cudaGraphNodeTypeMemAlloc), 0U);
  EXPECT_EQ(nodes.count(cudaGraphNodeTypeHost), 0U);
  EXPECT_GE(nodes.at(cudaGraphNodeTypeKernel), 6);
}

TEST_F(AlibiCudaGraph, EmptyTensorsLaunchNothing) {
  for (const int empty : {0, 1, 2, 3}) {
    AlibiCase c;
    c.batch = empty == 0 ? 0 : c.batch;
    c.heads = empty == 1 ? 0 : c.heads;
    c.q_len = empty == 2 ? 0 : c.q_len;
    c.k_len = empty == 3 ? 0 : c.k_len;
    const AlibiInputs in = inputs(c);
    EXPECT_EQ(recorded_nodes([&] { add_of(in), softmax_of(in); }), NodeCounts()) << c;
    if (empty != 0) {
      EXPECT_EQ(recorded_nodes([&] { bias_of(in, at::kFloat); }), NodeCounts()) << c;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Streams, threads, devices

TEST_F(AlibiCuda, RunsOnTheCurrentStream) {
  const AlibiInputs in = leaves(all_flags());
  const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
  const TensorList expected = everything(in, grad);
  AlibiInputs late = in;
  late.scores = at::zeros_like(in.scores);
  late.slopes = at::zeros_like(in.slopes);
  const at::Tensor late_grad = at::zeros_like(grad);
  late = with_alibi_grad(late, true, true);
  c10::cuda::device_synchronize();

  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  // The inputs are zeros until this stream has copied the values, so work on another stream would read zeros.
  at::cuda::sleep(kLongSleep / 10);
  {
    const at::NoGradGuard no_grad;
    late.scores.copy_(in.scores);
    late.slopes.copy_(in.slopes);
    late_grad.copy_(grad);
  }
  const TensorList found = everything(late, late_grad);
  stream.synchronize();
  expect_all_same_bits(found, expected);
}

TEST_F(AlibiCudaGraph, TheHostDoesNotWait) {
  const AlibiInputs in = leaves(all_flags());
  const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
  everything(in, grad);
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  stream.synchronize();
  at::cuda::sleep(kLongSleep);
  everything(in, grad);
  // If the host had waited, the stream would be idle by now.
  EXPECT_FALSE(stream.query());
  stream.synchronize();
}

TEST_F(AlibiCuda, ASecondThreadGetsTheSameBits) {
  const AlibiInputs in = leaves(all_flags());
  const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
  const TensorList expected = everything(in, grad);
  TensorList found;
  std::thread([&] {
    found = everything(in, grad);
    c10::cuda::device_synchronize();
  }).join();
  expect_all_same_bits(found, expected);
}

TEST_F(AlibiCuda, ADeviceThatIsNotTheCurrentOneWorks) {
  if (c10::cuda::device_count() < 2) {
    GTEST_SKIP() << "needs two CUDA devices";
  }
  const at::Device second(at::kCUDA, 1);
  const AlibiInputs on_first = leaves(all_flags());
  const at::Tensor grad = random_tensor(on_first.scores.sizes(), kTarget);
  const TensorList expected = everything(on_first, grad);
  AlibiInputs in = on_first;
  in.scores = on_first.scores.detach().to(second).requires_grad_();
  in.slopes = on_first.slopes.detach().to(second).requires_grad_();
  in.key_padding_mask = on_first.key_padding_mask->to(second);
  ASSERT_EQ(c10::cuda::current_device(), 0);
  const TensorList found = everything(in, grad.to(second));
  EXPECT_EQ(found[0].device(), second);
  expect_all_same_bits(found, expected);
  EXPECT_EQ(c10::cuda::current_device(), 0);
  in.slopes = on_first.slopes;
  expect_error([&] { add_of(in); }, {"expected slopes", "device of scores", "cuda:1", "got cuda:0"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs

TEST_F(AlibiCudaGraph, ReplayComputesWithWhatItsInputsHoldNow) {
  for (const int64_t keys : {40, 2048, 20000}) {
    AlibiCase c = all_flags();
    c.k_len = keys;
    c.q_len = 4;
    const AlibiInputs in = leaves(c);
    const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
    TensorList found;
    at::cuda::CUDAGraph graph;
    capture(graph, [&] { found = everything(in, grad); });
    {
      const at::NoGradGuard no_grad;
      in.scores.copy_(random_tensor(in.scores.sizes(), kTarget));
      in.slopes.mul_(0.5);
      in.key_padding_mask->copy_(random_mask(c.batch, keys, at::kCUDA));
      grad.copy_(random_tensor(grad.sizes(), kTarget));
    }
    c10::cuda::device_synchronize();
    graph.replay();
    c10::cuda::device_synchronize();
    expect_all_same_bits(found, everything(in, grad));
  }
}

TEST_F(AlibiCudaGraph, ReplayedModuleUsesItsSlopes) {
  AlibiInputs in = inputs();
  posenc::ALiBiBias alibi{posenc::ALiBiBiasOptions(3)};
  alibi->slopes_on(at::Device(at::kCUDA, 0));
  at::Tensor y;
  at::cuda::CUDAGraph graph;
  capture(graph, [&] { y = alibi->forward(in.scores); });
  in.scores.copy_(random_tensor(in.scores.sizes(), kTarget));
  c10::cuda::device_synchronize();
  graph.replay();
  c10::cuda::device_synchronize();
  in.slopes = posenc::alibi_slopes(3);
  expect_sum(y, in);
}

TEST_F(AlibiCudaGraph, CopyingSlopesDuringACaptureIsAnError) {
  ALiBiBias alibi{ALiBiBiasOptions(3)};
  const at::Tensor scores = at::randn({1, 3, 4, 4}, at::kCUDA);
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromPool());
  at::cuda::CUDAGraph refused;
  refused.capture_begin();
  expect_error([&] { alibi->forward(scores); }, {"ALiBiBias", "before a graph is captured", "slopes_on"});
  refused.capture_end();
  alibi->slopes_on(at::kCUDA);
  at::cuda::CUDAGraph graph;
  capture(graph, [&] { alibi->forward(scores); });
}

}  // namespace
}  // namespace posenc::test

#else

TEST(AlibiCuda, NeedsABuildWithCuda) {
  posenc::test::require_device(at::kCUDA);
}

#endif
