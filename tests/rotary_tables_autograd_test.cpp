#include "gradcheck.h"
#include "learnable_frequencies_support.h"

#include <posenc/frequencies.h>
#include <posenc/reference.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>

// Derivatives of rotary_tables.
namespace posenc::test {
namespace {

constexpr int64_t kHeadDim = 16;

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

}  // namespace
}  // namespace posenc::test
