#include "gradcheck.h"
#include "support.h"

#if POSENC_CUDA
#include "cuda_support.h"
#endif

#include <posenc/frequencies.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/reference.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/serialize.h>

#include <array>
#include <cmath>
#include <sstream>
#include <utility>

namespace posenc::test {
namespace {

using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

constexpr int64_t kHeadDim = 16;

// ---------------------------------------------------------------------------------------------------------------------
// Derivatives of rotary_tables

/// The gradient of inv_freq by a scalar loop in float64, and an upper bound of its magnitude: the sum of absolute terms
/// with 1 in place of all cosines and sines.
std::pair<at::Tensor, at::Tensor> scalar_frequency_gradient(
    const at::Tensor& inv_freq,
    const at::Tensor& grad_cos,
    const at::Tensor& grad_sin,
    double attention_factor) {
  const auto wide = [](const at::Tensor& tensor) { return tensor.detach().to(at::kCPU, at::kDouble).contiguous(); };
  const at::Tensor frequencies = wide(inv_freq);
  const at::Tensor dcos = wide(grad_cos);
  const at::Tensor dsin = wide(grad_sin);
  const int64_t pairs = frequencies.size(0);
  at::Tensor sum = at::zeros({pairs}, at::kDouble);
  at::Tensor magnitude = at::zeros({pairs}, at::kDouble);
  for (int64_t p = 0; p < dcos.size(0); ++p) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(p) * frequencies.data_ptr<double>()[i];
      const double of_cos = dcos.data_ptr<double>()[p * pairs + i];
      const double of_sin = dsin.data_ptr<double>()[p * pairs + i];
      const double scale = attention_factor * static_cast<double>(p);
      sum.data_ptr<double>()[i] += scale * (std::cos(angle) * of_sin - std::sin(angle) * of_cos);
      magnitude.data_ptr<double>()[i] += scale * (std::abs(of_sin) + std::abs(of_cos));
    }
  }
  return {sum, magnitude};
}

/// The parameter is the device and the dtype of inv_freq, cos and sin.
class RotaryTablesAutograd : public TargetTest {
 protected:
  at::Tensor inv_freq(int64_t rotary_dim) const {
    return posenc::rotary_inv_freq(rotary_dim).to(dtype()).to(device()).requires_grad_();
  }
  at::Tensor random(at::IntArrayRef sizes) const { return random_tensor(sizes, GetParam()); }

  /// Expects the gradient of the operator to equal that of the scalar loop. cos, sin and the result are rounded to the
  /// dtype. In both, terms, sums and angles of up to `grad_cos.size(0)` have rounding errors of float64.
  void expect_gradient(const at::Tensor& leaf, const at::Tensor& grad_cos, const at::Tensor& grad_sin, double factor)
      const {
    const auto [cos, sin] = posenc::rotary_tables(leaf, grad_cos.size(0), dtype(), factor);
    const at::Tensor found = gradients({cos, sin}, {leaf}, {grad_cos, grad_sin})[0];
    EXPECT_EQ(found.scalar_type(), leaf.scalar_type());
    const auto [expected, magnitude] = scalar_frequency_gradient(leaf, grad_cos, grad_sin, factor);
    const double of_float64 = 8 * static_cast<double>(grad_cos.size(0) + 1) * unit_roundoff(at::kDouble);
    expect_within(found, expected, magnitude * (2 * unit_roundoff(dtype()) + of_float64));
  }
};

std::vector<Target> table_targets(at::DeviceType device) {
  return {{device, at::kFloat}, {device, at::kDouble}};
}

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryTablesAutograd, ::testing::ValuesIn(table_targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryTablesAutograd, ::testing::ValuesIn(table_targets(at::kCUDA)), target_name);

TEST_P(RotaryTablesAutograd, GradientMatchesTheScalarLoop) {
  // Positions: one, fewer than one block, several blocks. Pairs: one, an odd number, more than one block.
  for (const int64_t length : {1, 7, 100, 3001}) {
    for (const int64_t pairs : {1, 5, 64, 300}) {
      SCOPED_TRACE(::testing::Message() << length << " positions, " << pairs << " pairs");
      expect_gradient(inv_freq(2 * pairs), random({length, pairs}), random({length, pairs}), 1.25);
    }
  }
}

TEST_P(RotaryTablesAutograd, GradientOfManyBlocksMatchesTheScalarLoop) {
  expect_gradient(inv_freq(4), random({70000, 2}), random({70000, 2}), 1);
}

TEST_P(RotaryTablesAutograd, GradientsMayHaveAnyStrides) {
  const at::Tensor leaf = inv_freq(10);
  const at::Tensor transposed = random({5, 40}).t();
  const at::Tensor expanded = random({}).expand({40, 5});
  expect_gradient(leaf, transposed, expanded, 1);
  const at::Tensor every_other = random({40, 10}).slice(1, 0, {}, 2);
  expect_gradient(leaf, expanded, every_other, 1);
  expect_gradient(leaf, random({40, 5}), every_other, 1);
  expect_gradient(leaf, every_other, random({40, 5}), 1);
}

TEST_P(RotaryTablesAutograd, GradientOfOneTableIsEnough) {
  const at::Tensor leaf = inv_freq(10);
  const at::Tensor grad = random({40, 5});
  const auto [cos, sin] = posenc::rotary_tables(leaf, 40, dtype());
  const TensorList of_cos = gradients({cos}, {leaf}, {grad});
  const TensorList of_both = gradients({cos, sin}, {leaf}, {grad, at::zeros_like(grad)});
  expect_same_bits(of_cos[0], of_both[0]);
}

TEST_P(RotaryTablesAutograd, GradientIsTheSameBitForBitEachTime) {
  const at::Tensor leaf = inv_freq(128);
  const TensorList grads = {random({5000, 64}), random({5000, 64})};
  const auto run = [&] {
    const auto [cos, sin] = posenc::rotary_tables(leaf, 5000, dtype());
    return gradients({cos, sin}, {leaf}, grads)[0];
  };
  const at::Tensor first = run();
  for (int repeat = 0; repeat < 3; ++repeat) {
    expect_same_bits(run(), first);
  }
}

TEST_P(RotaryTablesAutograd, EmptyTablesGiveZeroGradients) {
  const at::Tensor leaf = inv_freq(10);
  const auto [cos, sin] = posenc::rotary_tables(leaf, 0, dtype());
  (cos.sum() + sin.sum()).backward();
  expect_same_bits(leaf.grad(), at::zeros_like(leaf));
}

TEST_P(RotaryTablesAutograd, SecondBackwardThroughAFreedGraphIsAnError) {
  const at::Tensor leaf = inv_freq(10);
  const at::Tensor cos = std::get<0>(posenc::rotary_tables(leaf, 4, dtype()));
  cos.sum().backward();
  expect_error([&] { cos.sum().backward(); }, {"second time"});
}

TEST_P(RotaryTablesAutograd, ForwardModeIsAnError) {
  const uint64_t level = torch::autograd::forward_ad::enter_dual_level();
  const at::Tensor primal = inv_freq(10).detach();
  const at::Tensor dual = at::_make_dual(primal, at::ones_like(primal), static_cast<int64_t>(level));
  expect_error([&] { posenc::rotary_tables(dual, 4); }, {"posenc::rotary_tables", "forward-mode"});
  torch::autograd::forward_ad::exit_dual_level(level);
}

class RotaryTablesDifferences : public DeviceTest {
 protected:
  static TensorList frequencies(c10::Device device) {
    return {at::tensor({1.0, 0.5, 0.03}, at::kDouble).to(device).requires_grad_()};
  }
  static TensorList tables(const TensorList& inputs) {
    const auto [cos, sin] = posenc::rotary_tables(inputs[0], 7, at::kDouble, 1.5);
    return {cos, sin};
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryTablesDifferences, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryTablesDifferences, ::testing::Values(at::kCUDA), device_name);

// Derivatives of order n have factors of up to 6^n, as the largest position is 6. Five points and a small step keep the
// truncation error, 6^5 step^4 / 30, at 1e-11.
TEST_P(RotaryTablesDifferences, Gradients) {
  gradcheck(tables, frequencies(device()), kSmooth);
}

TEST_P(RotaryTablesDifferences, SecondDerivatives) {
  gradgradcheck(tables, frequencies(device()), kSmooth);
}

TEST_P(RotaryTablesDifferences, GradientsOfTheGradientOfTheReferenceAreTheSame) {
  const TensorList leaf = frequencies(device());
  const auto second = [&](const auto& tables_of) {
    const auto [cos, sin] = tables_of(leaf[0], 7, at::kDouble, 1.5);
    const TensorList first = gradients({cos.square(), sin.exp()}, leaf, {at::ones_like(cos), at::ones_like(sin)}, true);
    return gradients({first[0]}, leaf, {at::ones_like(first[0])})[0];
  };
  const at::Tensor expected = second(posenc::reference::rotary_tables).cpu();
  const at::Tensor found = second([](auto... arguments) { return posenc::rotary_tables(arguments...); });
  expect_within(found, expected, (expected.abs() + 7 * 36) * 64 * unit_roundoff(at::kDouble));
}

// ---------------------------------------------------------------------------------------------------------------------
// rotary_tables_backward

at::Tensor tables_backward(const TensorList& tensors, at::ScalarType dtype = at::kFloat) {
  std::vector<c10::IValue> stack(tensors.begin(), tensors.end());
  stack.emplace_back(dtype);
  c10::Dispatcher::singleton().findSchemaOrThrow("posenc::rotary_tables_backward", "").callBoxed(stack);
  return stack[0].toTensor();
}

/// The sum over positions is a float64 sum, which must not be rounded to the narrower dtype of cos and sin.
TEST(RotaryTablesBackward, OfFloat64FrequenciesIsNotRoundedToTheDtypeOfTheTables) {
  constexpr int64_t kLength = 50;
  const at::Tensor inv_freq = rotary_inv_freq(kHeadDim, 100).requires_grad_();
  const auto [cos, sin] = rotary_tables(inv_freq, kLength, at::kFloat);
  const TensorList grads = random_like({cos, sin});
  const at::Tensor positions = at::arange(kLength, at::kDouble).unsqueeze(1);
  const auto wide = [](const at::Tensor& x) { return x.detach().to(at::kDouble); };
  const at::Tensor terms = positions * (wide(cos) * wide(grads[1]) - wide(sin) * wide(grads[0]));
  const at::Tensor actual = gradients({cos, sin}, {inv_freq}, grads)[0];
  expect_within(actual, terms.sum(0), terms.abs().sum(0) * (kLength * unit_roundoff(at::kDouble)));
}

TEST(RotaryTablesBackward, RejectsBadArguments) {
  const std::string op = "posenc::rotary_tables_backward: ";
  const at::Tensor good = at::zeros({4, 3});
  for (size_t i = 0; i < 4; ++i) {
    const char* name = std::array{"grad_cos", "grad_sin", "cos", "sin"}[i];
    const auto with = [&](const at::Tensor& bad) {
      TensorList tensors(4, good);
      tensors[i] = bad;
      return [tensors] { tables_backward(tensors); };
    };
    expect_error(with(good.to(at::kHalf)), {op, name, i == 2 ? "float32 or float64" : "Float", "Half"});
    expect_error(with(good[0]), {op, name, "[3]"});
  }
  expect_error([&] { tables_backward(TensorList(4, good), at::kHalf); }, {op, "dtype", "float32 or float64", "Half"});
}

TEST(RotaryTablesMeta, HasTheShapesOfTheCpu) {
  const auto options = at::TensorOptions(at::kDouble).device(at::kMeta);
  const at::Tensor leaf = at::empty({5}, options).requires_grad_();
  const auto [cos, sin] = posenc::rotary_tables(leaf, 7);
  for (const at::Tensor& table : {cos, sin}) {
    EXPECT_TRUE(table.is_meta());
    EXPECT_EQ(table.sizes(), at::IntArrayRef({7, 5}));
    EXPECT_EQ(table.scalar_type(), at::kFloat);
  }
  const at::Tensor found = gradients({cos, sin}, {leaf}, {at::empty_like(cos), at::empty_like(sin)})[0];
  EXPECT_TRUE(found.is_meta());
  EXPECT_EQ(found.sizes(), leaf.sizes());
  EXPECT_EQ(found.scalar_type(), at::kDouble);
  expect_error([&] { posenc::rotary_tables(leaf, -1); }, {"posenc::rotary_tables", "length", "-1"});
}

// ---------------------------------------------------------------------------------------------------------------------
// The module

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
