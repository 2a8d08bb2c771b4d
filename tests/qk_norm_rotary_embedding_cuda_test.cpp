#include "qk_norm_support.h"

#if POSENC_CUDA

#include "cuda_support.h"
#include "gradcheck.h"

#include <posenc/qk_norm_rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/cuda/Sleep.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace posenc::test {
namespace {

class QKNormRotaryEmbeddingCuda : public ::testing::Test {
 protected:
  void SetUp() override { require_device(at::kCUDA); }

  static QKNormInputs inputs(const RotaryCase& c = RotaryCase(), at::ScalarType dtype = at::kFloat) {
    return make_qk_norm_inputs(c, {at::kCUDA, dtype});
  }

  static TensorList arguments_of(const QKNormInputs& in) {
    return {in.rotary.q, in.rotary.k, in.q_weight, in.k_weight, in.rotary.cos, in.rotary.sin};
  }

  static at::Tensor random_like(const at::Tensor& x) { return random_tensor(x.sizes(), {at::kCUDA, x.scalar_type()}); }
};

/// Tests that need the caching allocator.
class QKNormRotaryEmbeddingCudaGraph : public QKNormRotaryEmbeddingCuda {
 protected:
  void SetUp() override {
    QKNormRotaryEmbeddingCuda::SetUp();
    require_caching_allocator();
  }

  /// Number of kernels of a backward pass for the tensors of `in` that require grad.
  static int kernels_of_backward(const QKNormInputs& in) {
    const TensorList dense{random_like(in.rotary.q), random_like(in.rotary.k)};
    const NodeCounts both = recorded_nodes([&] {
      const auto [q, k] = qk_norm_rotate(in);
      gradients({q, k}, arguments_of(in), dense);
    });
    EXPECT_EQ(both.size(), 1U);
    return both.at(cudaGraphNodeTypeKernel) - 1;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Launches

TEST_F(QKNormRotaryEmbeddingCudaGraph, ForwardIsOneKernel) {
  for (const int64_t head_dim : {16, 17, 128}) {
    RotaryCase c;
    c.head_dim = head_dim;
    c.positions = PositionShape::per_batch;
    const QKNormInputs in = inputs(c);
    EXPECT_EQ(recorded_nodes([&] { qk_norm_rotate(in); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
    const QKNormInputs leaves = with_leaves(in);
    EXPECT_EQ(recorded_nodes([&] { qk_norm_rotate(leaves); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
  }
}

TEST_F(QKNormRotaryEmbeddingCudaGraph, BackwardIsTwoKernelsAndOneWithoutWeights) {
  for (const int64_t head_dim : {16, 17, 128}) {
    RotaryCase c;
    c.head_dim = head_dim;
    QKNormInputs in = with_leaves(inputs(c), /*tables=*/false);
    EXPECT_EQ(kernels_of_backward(in), 2);
    in.q_weight = in.q_weight.detach();
    in.k_weight = in.k_weight.detach();
    EXPECT_EQ(kernels_of_backward(in), 1);
  }
}

TEST_F(QKNormRotaryEmbeddingCudaGraph, EmptyTensorsLaunchNothingForward) {
  RotaryCase c;
  c.tokens = 0;
  const QKNormInputs in = inputs(c);
  EXPECT_EQ(recorded_nodes([&] { qk_norm_rotate(in); }), NodeCounts());
}

TEST_F(QKNormRotaryEmbeddingCudaGraph, NothingIsAllocatedOutsideTheCachingAllocator) {
  const QKNormInputs in = with_leaves(inputs());
  const NodeCounts nodes = recorded_nodes([&] {
    const auto [q, k] = qk_norm_rotate(in);
    gradients({q, k}, arguments_of(in), {q.detach(), k.detach()});
  });
  EXPECT_EQ(nodes.count(cudaGraphNodeTypeMemAlloc), 0U);
}

TEST_F(QKNormRotaryEmbeddingCudaGraph, TheHostDoesNotWait) {
  RotaryCase c;
  c.positions = PositionShape::per_batch;
  const QKNormInputs in = with_leaves(inputs(c));
  const auto run = [&] {
    const auto [q, k] = qk_norm_rotate(in);
    return gradients({q, k}, arguments_of(in), {q.detach(), k.detach()});
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

TEST_F(QKNormRotaryEmbeddingCuda, RunsOnTheCurrentStreamAndBackwardOnThatOfForward) {
  const QKNormInputs in = with_leaves(inputs(), /*tables=*/false);
  const at::Tensor grad = random_like(in.rotary.q);
  const auto [expected_q, expected_k] = qk_norm_rotate(in);
  const TensorList expected = gradients({expected_q}, {in.rotary.q, in.q_weight}, {grad});
  QKNormInputs late = in;
  late.rotary.q = at::zeros_like(in.rotary.q).requires_grad_();
  at::Tensor late_grad = at::zeros_like(grad);
  c10::cuda::device_synchronize();

  const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
  const c10::cuda::CUDAStreamGuard guard(stream);
  // The inputs are zeros until this stream has copied the values, so work on another stream would read zeros.
  at::cuda::sleep(kLongSleep / 10);
  {
    const at::NoGradGuard no_grad;
    late.rotary.q.copy_(in.rotary.q);
  }
  const at::Tensor q = std::get<0>(qk_norm_rotate(late));
  at::cuda::sleep(kLongSleep / 10);
  late_grad.copy_(grad);
  const TensorList found = gradients({q}, {late.rotary.q, late.q_weight}, {late_grad});
  stream.synchronize();
  expect_same_bits(q, expected_q);
  expect_same_bits(found[0], expected[0]);
  expect_same_bits(found[1], expected[1]);
}

TEST_F(QKNormRotaryEmbeddingCudaGraph, ReplayGivesTheResultsAndGradientsOfWhatItsInputsHoldNow) {
  for (const PositionShape positions : {PositionShape::absent, PositionShape::per_batch}) {
    RotaryCase c;
    c.head_dim = c.rotary_dim = 64;
    c.positions = positions;
    const QKNormInputs in = with_leaves(inputs(c, at::kBFloat16));
    const at::Tensor grad_q = random_like(in.rotary.q);
    const at::Tensor grad_k = random_like(in.rotary.k);
    const auto run = [&] {
      const auto [q, k] = qk_norm_rotate(in);
      TensorList results = gradients({q, k}, arguments_of(in), {grad_q, grad_k});
      results.push_back(q);
      results.push_back(k);
      return results;
    };
    TensorList found;
    at::cuda::CUDAGraph graph;
    capture(graph, [&] { found = run(); });
    {
      const at::NoGradGuard no_grad;
      for (const at::Tensor& argument : arguments_of(in)) {
        argument.copy_(at::randn(argument.sizes(), at::kDouble));
      }
      grad_q.copy_(random_like(grad_q));
      grad_k.copy_(random_like(grad_k));
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

TEST_F(QKNormRotaryEmbeddingCuda, ADeviceThatIsNotTheCurrentOneWorks) {
  if (c10::cuda::device_count() < 2) {
    GTEST_SKIP() << "needs two CUDA devices";
  }
  const at::Device second(at::kCUDA, 1);
  QKNormInputs in = inputs();
  for (at::Tensor* tensor : {&in.rotary.q, &in.rotary.k, &in.rotary.cos, &in.rotary.sin, &in.q_weight, &in.k_weight}) {
    *tensor = tensor->to(second);
  }
  in = with_leaves(in);
  ASSERT_EQ(c10::cuda::current_device(), 0);
  const auto [q, k] = qk_norm_rotate(in);
  EXPECT_EQ(q.device(), second);
  expect_within(q, scalar_qk_norm(in, in.rotary.q, in.q_weight));
  const at::Tensor grad = random_like(in.rotary.q).to(second);
  const TensorList found = gradients({q}, {in.rotary.q, in.q_weight}, {grad});
  const ExpectedGradients expected = scalar_qk_norm_gradients(in, in.rotary.q, in.q_weight, grad);
  expect_within(found[0], expected.input);
  expect_within(found[1], expected.weight);
  EXPECT_EQ(c10::cuda::current_device(), 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sizes

TEST_F(QKNormRotaryEmbeddingCuda, HeadsLargerThanSharedMemoryAreAnError) {
  RotaryCase c;
  c.batch = c.tokens = c.q_heads = c.k_heads = 1;
  c.head_dim = c.rotary_dim = 4096;
  const QKNormInputs largest = with_leaves(inputs(c), /*tables=*/false);
  const auto [q, k] = qk_norm_rotate(largest);
  expect_within(q, scalar_qk_norm(largest, largest.rotary.q, largest.q_weight));
  const at::Tensor grad = random_like(q);
  const TensorList found = gradients({q}, {largest.rotary.q, largest.q_weight}, {grad});
  const ExpectedGradients expected = scalar_qk_norm_gradients(largest, largest.rotary.q, largest.q_weight, grad);
  expect_within(found[0], expected.input);
  expect_within(found[1], expected.weight);
  c.head_dim = c.rotary_dim = 4098;
  expect_error(
      [&] { qk_norm_rotate(inputs(c)); },
      {"posenc::qk_norm_rotary_embedding: ", "head size of at most 4096 on CUDA, got 4098"});
}

TEST_F(QKNormRotaryEmbeddingCuda, MoreThan65535OfAnySizeWork) {
  constexpr int64_t kMany = 65'537;
  const auto check = [](const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.batch = c.tokens = c.q_heads = c.k_heads = 1;
    c.head_dim = c.rotary_dim = 8;
    c.spare_rows = 0;
    change(c);
    SCOPED_TRACE(::testing::Message() << c);
    const QKNormInputs in = with_leaves(inputs(c), /*tables=*/false);
    const auto [q, k] = qk_norm_rotate(in);
    expect_within(q, scalar_qk_norm(in, in.rotary.q, in.q_weight));
    expect_within(k, scalar_qk_norm(in, in.rotary.k, in.k_weight));
    const at::Tensor grad = random_like(q);
    const TensorList found = gradients({q}, {in.rotary.q, in.q_weight}, {grad});
    const ExpectedGradients expected = scalar_qk_norm_gradients(in, in.rotary.q, in.q_weight, grad);
    expect_within(found[0], expected.input);
    expect_within(found[1], expected.weight);
  };
  check([](RotaryCase& c) { c.batch = kMany; });
  check([](RotaryCase& c) { c.tokens = kMany; });
  check([](RotaryCase& c) { c.q_heads = kMany; });
  check([](RotaryCase& c) { c.k_heads = kMany; });
  check([](RotaryCase& c) { c.packed = true, c.tokens = kMany; });
}

TEST_F(QKNormRotaryEmbeddingCuda, MoreThanTwoToThe31ElementsWork) {
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
    QKNormInputs in;
    in.rotary.q = x.requires_grad_();
    in.rotary.k = at::ones({1, tokens, 0, head_dim}, options);
    in.q_weight = at::randn({head_dim}).to(at::kCUDA, at::kBFloat16);
    in.k_weight = in.q_weight;
    in.rotary.cos = at::randn({1009, head_dim / 2}).to(at::kCUDA);
    in.rotary.sin = at::randn({1009, head_dim / 2}).to(at::kCUDA);
    const at::Tensor positions = at::arange(tokens, options.dtype(at::kLong)).remainder(1009);
    in.rotary.positions = positions;
    const at::Tensor q = std::get<0>(qk_norm_rotate(in));
    const at::Tensor grad = at::ones({}, options).expand_as(q);
    const at::Tensor found = gradients({q}, {in.rotary.q}, {grad})[0];
    // First, middle and last tokens; the last are beyond 2^31 elements.
    for (const int64_t begin : {int64_t{0}, tokens / 2 - 8, tokens - 16}) {
      QKNormInputs part = in;
      part.rotary.positions = positions.narrow(0, begin, 16);
      const at::Tensor from = in.rotary.q.narrow(1, begin, 16);
      part.rotary.q = from;  // the scalar loop converts the whole of q to float64
      expect_within(q.narrow(1, begin, 16), scalar_qk_norm(part, from, in.q_weight));
      const ExpectedGradients expected = scalar_qk_norm_gradients(part, from, in.q_weight, grad.narrow(1, begin, 16));
      expect_within(found.narrow(1, begin, 16), expected.input);
    }
  }
}

}  // namespace
}  // namespace posenc::test

#else

TEST(QKNormRotaryEmbeddingCuda, NeedsABuildWithCuda) {
  posenc::test::require_device(at::kCUDA);
}

#endif
