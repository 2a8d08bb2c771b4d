#include "alibi_support.h"

#if POSENC_CUDA

#include "cuda_support.h"
#include "gradcheck.h"

#include <posenc/modules/alibi_bias.h>

#include <ATen/ATen.h>
#include <ATen/cuda/Sleep.h>

#include <thread>

namespace posenc::test {
namespace {

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

// ---------------------------------------------------------------------------------------------------------------------
// Sizes

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

TEST_F(AlibiCuda, MoreThan65535QueriesOrKeysWork) {
  constexpr int64_t kMany = 65'537;
  const auto check = [](const std::function<void(AlibiCase&)>& change) {
    AlibiCase c;
    c.batch = c.heads = 1;
    c.q_len = 1;
    c.k_len = 5;
    change(c);
    SCOPED_TRACE(::testing::Message() << c);
    const AlibiInputs in = leaves(c);
    const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
    expect_bias(bias_of(in, at::kFloat), in, c.q_len, c.k_len);
    const at::Tensor sum = add_of(in);
    expect_sum(sum, in);
    expect_slope_gradient(gradients({sum}, {in.slopes}, {grad})[0], scalar_add_gradients(in, grad), 1e-6);
    const at::Tensor softmax = softmax_of(in);
    expect_softmax(softmax, in);
    const TensorList found = gradients({softmax}, {in.scores, in.slopes}, {grad});
    expect_softmax_gradients(found[0], found[1], in, grad);
  };
  check([](AlibiCase& c) { c.q_len = kMany; });
  check([](AlibiCase& c) { c.k_len = kMany; });
}

TEST_F(AlibiCuda, MoreThan65535HeadsOrBatchesWork) {
  const auto check = [](int64_t batch, int64_t heads) {
    AlibiCase c;
    c.batch = batch;
    c.heads = heads;
    c.q_len = 2;
    c.k_len = 3;
    c.causal = true;
    SCOPED_TRACE(::testing::Message() << c);
    const AlibiInputs in = leaves(c);
    const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
    expect_bias(bias_of(in, at::kFloat), in, c.q_len, c.k_len);
    const at::Tensor sum = add_of(in);
    expect_sum(sum, in);
    const TensorList of_sum = gradients({sum}, {in.scores, in.slopes}, {grad});
    const AlibiGradients expected = scalar_add_gradients(in, grad);
    expect_within(of_sum[0], expected.scores, at::zeros({}, at::kDouble));
    expect_slope_gradient(of_sum[1], expected, 1e-6);
    const AlibiGradients of_one = scalar_add_gradients(in, at::ones_like(grad));
    expect_slope_gradient(
        gradients({add_of(in)}, {in.slopes}, {at::ones({}, kTarget.device).expand_as(sum)})[0], of_one, 1e-6);
    const at::Tensor softmax = softmax_of(in);
    expect_softmax(softmax, in);
    const TensorList found = gradients({softmax}, {in.scores, in.slopes}, {grad});
    expect_softmax_gradients(found[0], found[1], in, grad);
  };
  check(70'000, 1);
  check(1, 70'000);
  check(257, 300);  // 77100 batches times heads
}

TEST_F(AlibiCuda, SlopeGradientsOf16384TokensAreThoseOfFloat64) {
  if (const std::string reason = too_large(24); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  constexpr int64_t kTokens = 16384;
  const auto options = at::TensorOptions(at::kFloat).device(at::kCUDA);
  const at::Tensor positions = at::arange(kTokens, options.dtype(at::kDouble));
  const at::Tensor distances = (positions.unsqueeze(0) - positions.unsqueeze(1)).abs();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor slopes = posenc::alibi_slopes(2).to(at::kCUDA).requires_grad_();
    const at::Tensor grad = at::rand({2, kTokens, kTokens}, options).to(dtype);
    const at::Tensor bias = posenc::alibi_bias(slopes, kTokens, kTokens, /*causal=*/false, dtype);
    const at::Tensor of_bias = gradients({bias}, {slopes}, {grad})[0];
    const at::Tensor of_sum = gradients({posenc::alibi_add(bias.detach(), slopes)}, {slopes}, {grad})[0];
    for (int64_t h = 0; h < 2; ++h) {
      const double expected = -(grad[h].to(at::kDouble) * distances).sum().item<double>();
      EXPECT_NEAR(of_bias[h].item<double>(), expected, 1e-5 * std::abs(expected));
      EXPECT_NEAR(of_sum[h].item<double>(), expected, 1e-5 * std::abs(expected));
    }
  }
}

/// A call for `count` rows of one head of `in`.
AlibiInputs rows_of(const AlibiInputs& in, int64_t head, int64_t begin, int64_t count) {
  AlibiInputs part = in;
  part.scores = in.scores.detach().narrow(1, head, 1).narrow(2, begin, count);
  part.slopes = in.slopes.detach().narrow(0, head, 1);
  part.query_offset = in.scores.size(-1) - in.scores.size(-2) + begin;
  return part;
}

TEST_F(AlibiCuda, MoreThanTwoToThe31ElementsWork) {
  if (const std::string reason = too_large(40); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  const auto options = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  struct Shape {
    int64_t heads;
    int64_t tokens;
  };
  // Softmax rows that are kept in registers, ones that are read twice, and more than 2^31 elements in a single head.
  for (const Shape& shape : {Shape{33, 8192}, Shape{3, 32768}, Shape{1, 46344}}) {
    for (const bool causal : {false, true}) {
      SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens" << (causal ? ", causal" : ""));
      AlibiInputs in;
      in.causal = causal;
      in.scale = 0.5;
      in.scores = at::randn({1, shape.heads, shape.tokens, shape.tokens}, options).requires_grad_();
      ASSERT_GT(in.scores.numel(), int64_t{1} << 31);
      in.slopes = posenc::alibi_slopes(shape.heads).to(at::kCUDA).requires_grad_();
      const std::vector<int64_t> begins{0, shape.tokens / 2 - 2, shape.tokens - 4};
      const auto rows = [](const at::Tensor& y, int64_t head, int64_t begin) {
        return y.narrow(-3, head, 1).narrow(-2, begin, 4);
      };
      const auto for_some_rows = [&](const std::function<void(int64_t, int64_t, const AlibiInputs&)>& check) {
        for (const int64_t head : {int64_t{0}, shape.heads - 1}) {
          for (const int64_t begin : begins) {
            check(head, begin, rows_of(in, head, begin, 4));
          }
        }
      };
      {
        const at::Tensor bias = bias_of(in, at::kBFloat16).detach();
        for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
          expect_bias(rows(bias, head, begin), part, 4, shape.tokens);
        });
      }
      {
        const at::Tensor sum = add_of(in);
        for_some_rows(
            [&](int64_t head, int64_t begin, const AlibiInputs& part) { expect_sum(rows(sum, head, begin), part); });
        const at::Tensor ones = at::ones({}, options).expand_as(sum);
        const TensorList found = gradients({sum}, {in.scores, in.slopes}, {ones});
        for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
          const at::Tensor visible = scalar_bias(part).isinf().logical_not();
          expect_same_bits(rows(found[0], head, begin), visible.to(at::kBFloat16));
        });
        // Sum of |i - j| over all pairs of n tokens; causal: half of it.
        const double n = static_cast<double>(shape.tokens);
        const double distance = (causal ? 0.5 : 1) * n * (n * n - 1) / 3;
        const at::Tensor dense = gradients({sum}, {in.slopes}, {ones.contiguous()})[0];
        for (int64_t h = 0; h < shape.heads; ++h) {
          EXPECT_NEAR(found[1][h].item<double>(), -distance, 1e-6 * distance);
          EXPECT_NEAR(dense[h].item<double>(), -distance, 1e-6 * distance);
        }
      }
      const at::Tensor softmax = softmax_of(in);
      for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
        expect_softmax(rows(softmax, head, begin), part);
      });
      const at::Tensor grad = at::randn(softmax.sizes(), options);
      const TensorList found = gradients({softmax}, {in.scores}, {grad});
      for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
        expect_softmax_gradients(rows(found[0], head, begin), at::Tensor(), part, rows(grad, head, begin));
      });
    }
  }
}

}  // namespace
}  // namespace posenc::test

#else

TEST(AlibiCuda, NeedsABuildWithCuda) {
  posenc::test::require_device(at::kCUDA);
}

#endif
