#include "gradcheck.h"
#include "learnable_frequencies_support.h"

#if POSENC_CUDA
#include "cuda_support.h"
#endif

#include <posenc/frequencies.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <torch/serialize.h>

#include <sstream>

namespace posenc::test {
namespace {

using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

constexpr int64_t kHeadDim = 16;

class LearnableFrequencies : public TargetTest {
 protected:
  static RotaryEmbeddingOptions options() {
    return RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8).learnable_frequencies(true);
  }
  RotaryEmbedding module(const RotaryEmbeddingOptions& of = options()) const {
    RotaryEmbedding rope(of);
    rope->to(device());
    return rope;
  }
  at::Tensor random(at::IntArrayRef sizes) const { return random_tensor(sizes, GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, LearnableFrequencies, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, LearnableFrequencies, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(LearnableFrequencies, ForwardIsTheOperatorOnTablesOfTheParameter) {
  const at::Tensor q = random({2, 5, 4, kHeadDim});
  const at::Tensor k = random({2, 5, 2, kHeadDim});
  RotaryEmbedding rope = module(options().interleaved(true));
  const auto [cos, sin] = posenc::rotary_tables(rope->inv_freq.detach(), 5, table_dtype(dtype()));
  const auto [expected_q, expected_k] = posenc::rotary_embedding_qk(q, k, cos, sin, std::nullopt, true);
  const auto [actual_q, actual_k] = rope->forward(q, k);
  expect_same_bits(actual_q, expected_q);
  expect_same_bits(actual_k, expected_k);
  expect_same_bits(rope->rotate(q), expected_q);
}

TEST_P(LearnableFrequencies, StartAsTheFixedOnes) {
  const at::Tensor x = random({1, 40, 2, kHeadDim});
  RotaryEmbedding rope = module();
  RotaryEmbedding fixed(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor fixed_result = fixed->rotate(x).cpu().to(at::kDouble);
  // Rounding inv_freq to float32 changes the angle of the last token by up to 40 roundings. Table entries and the
  // result are also rounded.
  const double bound = 3 * unit_roundoff(dtype()) + 2 * (40 + 2) * unit_roundoff(at::kFloat);
  const at::Tensor largest = x.cpu().to(at::kDouble).abs().amax(-1, /*keepdim=*/true) * 2;
  expect_within(rope->rotate(x), fixed_result, (largest * bound).expand_as(fixed_result));
}

TEST_P(LearnableFrequencies, GradientIsThatOfTheTables) {
  const RotaryCase c;
  RotaryInputs in = make_inputs(c, GetParam());
  RotaryEmbedding rope = module();
  const at::Tensor grad_q = random(in.q.sizes());
  const at::Tensor grad_k = random(in.k.sizes());
  const auto [q, k] = rope->forward(in.q, in.k);
  const at::Tensor found = gradients({q, k}, {rope->inv_freq}, {grad_q, grad_k})[0];
  EXPECT_EQ(found.scalar_type(), at::kFloat);

  std::tie(in.cos, in.sin) = posenc::rotary_tables(rope->inv_freq.detach(), c.tokens, table_dtype(dtype()));
  const TableGradients of_tables = scalar_table_gradients(in, {{grad_q, in.q}, {grad_k, in.k}});
  const at::Tensor expected = scalar_frequency_gradient(rope->inv_freq, of_tables.dcos, of_tables.dsin, 1).first;
  const at::Tensor magnitude =
      scalar_frequency_gradient(rope->inv_freq, of_tables.dcos_magnitude, of_tables.dsin_magnitude, 1).second;
  // Each term of the sum that is a table gradient has two roundings, and the table entry that multiplies it has one.
  // The result is also rounded.
  const auto roundings = static_cast<double>(4 * c.batch * (c.q_heads + c.k_heads) + 1);
  expect_within(
      found, expected, magnitude * (roundings * unit_roundoff(table_dtype(dtype())) + 2 * unit_roundoff(at::kFloat)));
}

TEST_P(LearnableFrequencies, GradientIsTheSameBitForBitEachTime) {
  RotaryEmbedding rope = module();
  const at::Tensor q = random({3, 50, 4, kHeadDim}).requires_grad_();
  const at::Tensor k = random({3, 50, 2, kHeadDim}).requires_grad_();
  const at::Tensor positions = at::randint(0, 8, {3, 50}, at::kLong).to(device());
  const TensorList cotangents = {random(q.sizes()), random(k.sizes())};
  for (const auto& chosen : {std::optional<at::Tensor>(), std::optional<at::Tensor>(positions)}) {
    const auto run = [&] {
      const auto [q_out, k_out] = rope->forward(q, k, chosen);
      return gradients({q_out, k_out}, {q, k, rope->inv_freq}, cotangents);
    };
    const TensorList first = run();
    const TensorList again = run();
    for (size_t i = 0; i < first.size(); ++i) {
      expect_same_bits(again[i], first[i]);
    }
  }
}

class LearnableFrequenciesDifferences : public DeviceTest {
 protected:
  /// Checks the module as a function of q, k and inv_freq, all in float64.
  void check(
      const std::optional<at::Tensor>& positions,
      const std::function<void(const Differentiable&, const TensorList&)>& by) {
    RotaryEmbedding rope(RotaryEmbeddingOptions(6).max_position_embeddings(5).learnable_frequencies(true));
    rope->to(device());
    const Differentiable function = [&](const TensorList& inputs) {
      rope->inv_freq = inputs[2];
      const auto [q, k] = rope->forward(inputs[0], inputs[1], positions);
      return TensorList{q, k};
    };
    const auto leaf = [&](at::IntArrayRef sizes) {
      return random_tensor(sizes, {GetParam(), at::kDouble}).requires_grad_();
    };
    const at::Tensor inv_freq = at::tensor({1.0, 0.5, 0.03}, at::kDouble).to(device()).requires_grad_();
    by(function, {leaf({2, 3, 2, 6}), leaf({2, 3, 1, 6}), inv_freq});
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, LearnableFrequenciesDifferences, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, LearnableFrequenciesDifferences, ::testing::Values(at::kCUDA), device_name);

TEST_P(LearnableFrequenciesDifferences, Gradients) {
  const at::Tensor positions = at::tensor({4, 0, 2, 2, 2, 1}, at::kLong).view({2, 3}).to(device());
  for (const auto& chosen : {std::optional<at::Tensor>(), std::optional<at::Tensor>(positions)}) {
    check(chosen, [](const Differentiable& f, const TensorList& inputs) { gradcheck(f, inputs, kSmooth); });
  }
}

TEST_P(LearnableFrequenciesDifferences, SecondDerivatives) {
  const at::Tensor positions = at::tensor({4, 0, 2, 2, 2, 1}, at::kLong).view({2, 3}).to(device());
  for (const auto& chosen : {std::optional<at::Tensor>(), std::optional<at::Tensor>(positions)}) {
    check(chosen, [](const Differentiable& f, const TensorList& inputs) { gradgradcheck(f, inputs, kSmooth); });
  }
}

TEST_P(LearnableFrequenciesDifferences, PositionsOnTheDeviceReachTheReservedRows) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8).learnable_frequencies(true));
  rope->to(device());
  const at::Tensor x = random_tensor({1, 2, 1, kHeadDim}, {GetParam(), at::kFloat});
  const at::Tensor positions = at::tensor({7, 20}, at::kLong).to(device());
  rope->reserve(21, device());
  EXPECT_EQ(rope->table_length(device()), 21);
  rope->reserve(10, device());  // does not shrink the tables
  EXPECT_EQ(rope->table_length(device()), 21);
  EXPECT_FALSE(rope->rotate(x, positions).isnan().any().item<bool>());
  const auto copy = std::dynamic_pointer_cast<posenc::RotaryEmbeddingImpl>(rope->clone());
  EXPECT_EQ(copy->table_length(device()), 21);
  expect_same_bits(copy->rotate(x, positions), rope->rotate(x, positions));
}

TEST(LearnableFrequenciesModule, HasOneParameter) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).rotary_dim(8).base(500).learnable_frequencies(true));
  const auto parameters = rope->named_parameters();
  ASSERT_EQ(parameters.size(), 1U);
  EXPECT_EQ(parameters[0].key(), "inv_freq");
  EXPECT_TRUE(parameters[0].value().requires_grad());
  EXPECT_TRUE(rope->inv_freq.is_leaf());
  EXPECT_TRUE(rope->buffers().empty());
  expect_same_bits(rope->inv_freq, posenc::rotary_inv_freq(8, 500).to(at::kFloat));
}

TEST(LearnableFrequenciesModule, StaysFloat32) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).learnable_frequencies(true));
  const at::Tensor expected = rope->inv_freq.detach().clone();
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kDouble}) {
    rope->to(dtype);
    expect_same_bits(rope->inv_freq, expected);
    rope->to(at::kCPU, dtype);
    expect_same_bits(rope->inv_freq, expected);
    EXPECT_TRUE(rope->inv_freq.requires_grad());
  }
}

TEST(LearnableFrequenciesModule, IsClonedWithWhatItLearned) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).learnable_frequencies(true));
  const at::Tensor x = at::randn({1, 9, 2, kHeadDim});
  {
    const at::NoGradGuard no_grad;
    rope->inv_freq.mul_(3);
  }
  const at::Tensor expected = rope->rotate(x).detach();
  const auto copy = std::dynamic_pointer_cast<posenc::RotaryEmbeddingImpl>(rope->clone());
  expect_same_bits(copy->rotate(x), expected);
  // The copy has its own parameter.
  const at::NoGradGuard no_grad;
  copy->inv_freq.zero_();
  expect_same_bits(copy->rotate(x), x);
  expect_same_bits(rope->rotate(x), expected);
}

TEST(LearnableFrequenciesModule, IsSavedAndLoaded) {
  const auto options = RotaryEmbeddingOptions(kHeadDim).learnable_frequencies(true);
  RotaryEmbedding rope(options);
  const at::Tensor x = at::randn({1, 9, 2, kHeadDim});
  {
    const at::NoGradGuard no_grad;
    rope->inv_freq.mul_(3);
  }
  std::stringstream stream;
  torch::save(rope, stream);
  RotaryEmbedding loaded(options);
  torch::load(loaded, stream);
  expect_same_bits(loaded->rotate(x), rope->rotate(x));
}

TEST(LearnableFrequenciesModule, BecomesLearnableAndFixedByReset) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor x = at::randn({1, 9, 2, kHeadDim});
  const at::Tensor expected = rope->rotate(x);
  rope->options.learnable_frequencies(true);
  rope->reset();
  EXPECT_EQ(rope->parameters().size(), 1U);
  EXPECT_TRUE(rope->rotate(x).requires_grad());
  rope->reset();
  EXPECT_EQ(rope->parameters().size(), 1U);
  rope->options.learnable_frequencies(false);
  rope->reset();
  EXPECT_TRUE(rope->parameters().empty());
  EXPECT_FALSE(rope->inv_freq.defined());
  expect_same_bits(rope->rotate(x), expected);
}

TEST(LearnableFrequenciesModule, PositionsOfTheHostSetTheRows) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(4).learnable_frequencies(true));
  const at::Tensor x = at::randn({1, 2, 1, kHeadDim});
  const at::Tensor y = rope->rotate(x, at::tensor({100, 7}, at::kLong));
  EXPECT_FALSE(y.isnan().any().item<bool>());
}

TEST(LearnableFrequenciesModule, SaysSoWhenPrinted) {
  std::ostringstream stream;
  stream << *RotaryEmbedding(RotaryEmbeddingOptions(kHeadDim).learnable_frequencies(true));
  EXPECT_NE(stream.str().find("learnable_frequencies=true"), std::string::npos) << stream.str();
}

/// Module and input on different devices.
class LearnableFrequenciesMixedDevices : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cuda, LearnableFrequenciesMixedDevices, ::testing::Values(at::kCUDA), device_name);

TEST_P(LearnableFrequenciesMixedDevices, AreAnError) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).learnable_frequencies(true));
  const at::Tensor x = at::randn({1, 2, 1, kHeadDim}, device());
  expect_error([&] { rope->rotate(x); }, {"learnable frequencies", "cuda", "cpu", "move the module"});
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA graphs

#if POSENC_CUDA

class LearnableFrequenciesCudaGraph : public ::testing::Test {
 protected:
  void SetUp() override {
    require_device(at::kCUDA);
    require_caching_allocator();
  }
};

TEST_F(LearnableFrequenciesCudaGraph, TablesAreOneKernelAndTheirGradientTwo) {
  const at::Tensor leaf = posenc::rotary_inv_freq(128).to(at::kFloat).to(at::kCUDA).requires_grad_();
  EXPECT_EQ(recorded_nodes([&] { posenc::rotary_tables(leaf, 1000); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
  const TensorList grads = {at::randn({1000, 64}, at::kCUDA), at::randn({1000, 64}, at::kCUDA)};
  EXPECT_EQ(
      recorded_nodes([&] {
        const auto [cos, sin] = posenc::rotary_tables(leaf, 1000);
        gradients({cos, sin}, {leaf}, grads);
      }),
      (NodeCounts{{cudaGraphNodeTypeKernel, 3}}));
}

TEST_F(LearnableFrequenciesCudaGraph, ReplayedStepLearnsFromWhatItsInputsHoldNow) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).learnable_frequencies(true));
  rope->to(at::kCUDA);
  const auto leaf = [](int64_t heads) { return at::randn({2, 6, heads, kHeadDim}, at::kCUDA).requires_grad_(); };
  const at::Tensor q = leaf(4);
  const at::Tensor k = leaf(2);
  const at::Tensor positions = at::tensor({0, 1, 2, 3, 4, 5}, at::kLong).to(at::kCUDA);
  const TensorList cotangents = {at::randn_like(q), at::randn_like(k)};
  for (const auto& chosen : {std::optional<at::Tensor>(), std::optional<at::Tensor>(positions)}) {
    TensorList found;
    const auto action = [&] {
      const auto [q_out, k_out] = rope->forward(q, k, chosen);
      found = gradients({q_out, k_out}, {q, k, rope->inv_freq}, cotangents);
      found.push_back(q_out.detach());
    };
    at::cuda::CUDAGraph graph;
    capture(graph, action);
    const TensorList captured = found;
    {
      const at::NoGradGuard no_grad;
      q.normal_();
      k.normal_();
      rope->inv_freq.mul_(0.75);
      positions.copy_(at::tensor({9, 9, 1, 7, 0, 3}, at::kLong));
    }
    graph.replay();
    c10::cuda::device_synchronize();
    action();
    for (size_t i = 0; i < found.size(); ++i) {
      SCOPED_TRACE(i);
      expect_same_bits(captured[i], found[i]);
    }
  }
}

#endif

}  // namespace
}  // namespace posenc::test
