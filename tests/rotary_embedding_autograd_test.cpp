#include "gradcheck.h"
#include "support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

namespace posenc::test {
namespace {

/// One small call for each way to select rows of cos and sin.
std::vector<RotaryCase> small_cases() {
  std::vector<RotaryCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.name = name;
    c.tokens = 3;
    c.q_heads = 2;
    c.k_heads = 1;
    c.head_dim = 6;
    c.rotary_dim = 4;
    c.spare_rows = 1;
    change(c);
    cases.push_back(c);
  };
  add("NoPositions", [](RotaryCase&) {});
  add("Interleaved", [](RotaryCase& c) { c.interleaved = true; });
  add("Conjugate", [](RotaryCase& c) { c.conjugate = true; });
  add("FullWidth", [](RotaryCase& c) { c.head_dim = 4; });
  add("Packed", [](RotaryCase& c) { c.packed = true; });
  add("PackedPositions", [](RotaryCase& c) {
    c.packed = true;
    c.positions = PositionShape::per_token;
  });
  // Five tokens and two rows, so a row is read several times.
  add("PositionsPerTokenRepeated", [](RotaryCase& c) {
    c.tokens = 5;
    c.spare_rows = -3;
    c.positions = PositionShape::per_token;
    c.position_dtype = at::kInt;
  });
  add("PositionsPerBatch", [](RotaryCase& c) { c.positions = PositionShape::per_batch; });
  add("Axes", [](RotaryCase& c) {
    c.positions = PositionShape::per_batch;
    c.axes = 2;
  });
  add("AxesPackedRepeated", [](RotaryCase& c) {
    c.packed = true;
    c.tokens = 5;
    c.spare_rows = -3;
    c.positions = PositionShape::per_token;
    c.axes = 3;
    c.pair_axes = PairAxes::cycled;
    c.interleaved = true;
  });
  add("TablesPerToken", [](RotaryCase& c) { c.tables = TableShape::per_token; });
  add("TablesPerTokenShared", [](RotaryCase& c) { c.tables = TableShape::per_token_shared; });
  add("StridedTables", [](RotaryCase& c) { c.table_strides = TableStrides::transposed; });
  add("StridedInputs", [](RotaryCase& c) {
    c.q_strides = Strides::head_slice;
    c.k_strides = Strides::one_head;
    c.interleaved = true;
  });
  return cases;
}

/// Leaves with the values and strides of `inputs` that require grad as given.
RotaryInputs with_grad(const RotaryInputs& inputs, bool q, bool k, bool cos, bool sin) {
  RotaryInputs in = inputs;
  in.q = inputs.q.detach().requires_grad_(q);
  in.k = inputs.k.detach().requires_grad_(k);
  in.cos = inputs.cos.detach().requires_grad_(cos);
  in.sin = inputs.sin.detach().requires_grad_(sin);
  return in;
}

Differentiable pair_function(const RotaryInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    const auto [q, k] = posenc::rotary_embedding_qk(
        arguments[0], arguments[1], arguments[2], arguments[3], in.positions, in.interleaved, in.conjugate,
        in.pair_axes);
    return {q, k};
  };
}

Differentiable single_function(const RotaryInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    return {posenc::rotary_embedding(
        arguments[0], arguments[1], arguments[2], in.positions, in.interleaved, in.conjugate, in.pair_axes)};
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Central differences in float64

class RotaryEmbeddingDifferences : public ::testing::TestWithParam<std::tuple<at::DeviceType, RotaryCase>> {
 protected:
  void SetUp() override {
    require_device(std::get<0>(GetParam()));
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    inputs_ = make_inputs(std::get<1>(GetParam()), {std::get<0>(GetParam()), at::kDouble});
  }

  RotaryInputs inputs_;
};

TEST_P(RotaryEmbeddingDifferences, GradientsOfOneTensorAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, false, true, true);
  gradcheck(single_function(in), {in.q, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, GradientsOfThePairAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, true, true, true);
  gradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, GradientsOfCosAlone) {
  const RotaryInputs in = with_grad(inputs_, false, false, true, false);
  gradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, GradientsOfSinAlone) {
  const RotaryInputs in = with_grad(inputs_, false, false, false, true);
  gradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfInputs) {
  const RotaryInputs in = with_grad(inputs_, true, true, false, false);
  gradgradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfOneTensorAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, false, true, true);
  gradgradcheck(single_function(in), {in.q, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfThePairAndTables) {
  const RotaryInputs in = with_grad(inputs_, true, true, true, true);
  gradgradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

TEST_P(RotaryEmbeddingDifferences, SecondDerivativesOfCosAlone) {
  const RotaryInputs in = with_grad(inputs_, true, true, true, false);
  gradgradcheck(pair_function(in), {in.q, in.k, in.cos, in.sin});
}

std::string case_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, RotaryCase>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    RotaryEmbeddingDifferences,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(small_cases())),
    case_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    RotaryEmbeddingDifferences,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(small_cases())),
    case_name);

// ---------------------------------------------------------------------------------------------------------------------
// Every dtype

class RotaryEmbeddingAutograd : public TargetTest {
 protected:
  RotaryInputs inputs(const RotaryCase& c = RotaryCase()) const { return make_inputs(c, GetParam()); }
  at::Tensor random(at::IntArrayRef sizes, Strides strides = Strides::dense) const {
    return random_tensor(sizes, GetParam(), strides);
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingAutograd, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingAutograd, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(RotaryEmbeddingAutograd, BackwardIsTheAdjointOfForward) {
  for (const RotaryCase& c : small_cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = with_grad(inputs(c), true, true, false, false);
    const at::Tensor output = rotate(in, in.q);
    const at::Tensor y = random(in.q.sizes());
    const at::Tensor gradient = gradients({output}, {in.q}, {y})[0];
    RotaryInputs back = backwards(in);
    const double tolerance =
        inner_product(rounding_bound(in, in.q), y.abs()) + inner_product(rounding_bound(back, y), in.q.abs());
    EXPECT_NEAR(inner_product(output, y), inner_product(in.q, gradient), tolerance);
  }
}

TEST_P(RotaryEmbeddingAutograd, BackwardIsTheConjugateRotation) {
  for (const RotaryCase& c : small_cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = with_grad(inputs(c), true, true, false, false);
    const auto [q, k] = rotate_qk(in);
    RotaryInputs back = backwards(in);
    back.q = random(in.q.sizes());
    back.k = random(in.k.sizes());
    const TensorList found = gradients({q, k}, {in.q, in.k}, {back.q, back.k});
    const auto [expected_q, expected_k] = rotate_qk(back);
    expect_same_bits(found[0], expected_q);
    expect_same_bits(found[1], expected_k);
  }
}

TEST_P(RotaryEmbeddingAutograd, GradientOfAnyStridesMatchesTheReference) {
  const RotaryCase c;
  const RotaryInputs in = with_grad(inputs(c), true, true, false, false);
  for (int i = 0; i < kStrides; ++i) {
    SCOPED_TRACE(i);
    const auto [q, k] = rotate_qk(in);
    const at::Tensor grad_q = random(q.sizes(), static_cast<Strides>(i));
    const at::Tensor grad_k = random(k.sizes(), static_cast<Strides>(i));
    const TensorList found = gradients({q, k}, {in.q, in.k}, {grad_q, grad_k});
    const RotaryInputs conjugate = backwards(in);
    expect_close_to_rounding(found[0], conjugate, grad_q);
    expect_close_to_rounding(found[1], conjugate, grad_k);
  }
}

TEST_P(RotaryEmbeddingAutograd, GradientOfASumMatchesTheReference) {
  const RotaryInputs in = with_grad(inputs(), true, true, false, false);
  const auto [q, k] = rotate_qk(in);
  (q.sum() + k.sum()).backward();
  const RotaryInputs conjugate = backwards(in);
  expect_close_to_rounding(in.q.grad(), conjugate, at::ones_like(in.q));
  expect_close_to_rounding(in.k.grad(), conjugate, at::ones_like(in.k));
}

TEST_P(RotaryEmbeddingAutograd, TableGradientsMatchTheScalarLoop) {
  std::vector<RotaryCase> cases = small_cases();
  RotaryCase larger;
  larger.name = "Larger";
  larger.batch = 3;
  larger.tokens = 40;
  larger.q_heads = 7;
  larger.k_heads = 2;
  larger.head_dim = 40;
  larger.rotary_dim = 34;
  cases.push_back(larger);
  larger.positions = PositionShape::per_batch;
  cases.push_back(larger);
  larger.spare_rows = -39;  // one row, which every token reads
  cases.push_back(larger);
  larger.axes = 4;
  larger.pair_axes = PairAxes::random;
  cases.push_back(larger);
  larger.spare_rows = -30;
  cases.push_back(larger);
  for (const RotaryCase& c : cases) {
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = with_grad(inputs(c), true, true, true, true);
    const auto [q, k] = rotate_qk(in);
    const at::Tensor grad_q = random(q.sizes());
    const at::Tensor grad_k = random(k.sizes());
    const TensorList found = gradients({q, k}, {in.cos, in.sin}, {grad_q, grad_k});
    EXPECT_EQ(found[0].scalar_type(), in.cos.scalar_type());
    expect_table_gradients(found[0], found[1], scalar_table_gradients(in, {{grad_q, in.q}, {grad_k, in.k}}));
  }
}

TEST_P(RotaryEmbeddingAutograd, TableGradientsOfOneTensorMatchTheScalarLoop) {
  RotaryCase c;
  c.positions = PositionShape::per_batch;
  const RotaryInputs in = with_grad(inputs(c), false, false, true, true);
  const at::Tensor y = rotate(in, in.q);
  const at::Tensor grad = random(y.sizes(), Strides::one_value);
  const TensorList found = gradients({y}, {in.cos, in.sin}, {grad});
  expect_table_gradients(found[0], found[1], scalar_table_gradients(in, {{grad, in.q}}));
}

TEST_P(RotaryEmbeddingAutograd, TableGradientsAreZeroInRowsThatNoTokenRead) {
  RotaryCase c;
  c.tokens = 3;
  RotaryInputs in = with_grad(inputs(c), false, false, true, true);
  const auto expect_rows_read = [&](const std::vector<int64_t>& rows) {
    rotate(in, in.q).sum().backward();
    for (const at::Tensor& table : {in.cos, in.sin}) {
      at::Tensor read = at::zeros({table.size(0)}, at::kBool);
      for (const int64_t row : rows) {
        read[row].fill_(true);
      }
      EXPECT_TRUE(at::equal((table.grad() != 0).any(-1).cpu(), read));
      table.mutable_grad() = at::Tensor();
    }
  };
  expect_rows_read({0, 1, 2});
  in.positions = at::tensor({5, 1, 5}, at::kLong).to(device());
  expect_rows_read({1, 5});
}

TEST_P(RotaryEmbeddingAutograd, PositionOutsideTheTableLeavesTheOtherTableGradients) {
  RotaryCase c;
  c.batch = 1;
  c.tokens = 4;
  RotaryInputs in = with_grad(inputs(c), true, false, true, true);
  const at::Tensor grad = random(in.q.sizes());
  for (const int64_t outside : positions_outside(in.cos.size(0))) {
    SCOPED_TRACE(outside);
    in.positions = at::tensor({int64_t{2}, int64_t{1}, outside, int64_t{2}}, at::kLong).to(device());
    const TensorList found = gradients({rotate(in, in.q)}, {in.q, in.cos, in.sin}, {grad});
    EXPECT_TRUE(found[0].select(1, 2).isnan().all().item<bool>());
    const at::Tensor inside = at::tensor({0, 1, 3}, at::kLong).to(device());
    RotaryInputs expected = in;
    expected.positions = in.positions->index_select(0, inside);
    const at::Tensor x = in.q.detach().index_select(1, inside);
    expect_table_gradients(found[1], found[2], scalar_table_gradients(expected, {{grad.index_select(1, inside), x}}));
  }
}

TEST_P(RotaryEmbeddingAutograd, GradientsAreTheSameBitForBitEachTime) {
  RotaryCase c;
  c.batch = 4;
  c.tokens = 60;
  c.q_heads = 5;
  c.spare_rows = -50;
  for (const PositionShape positions : {PositionShape::absent, PositionShape::per_batch}) {
    c.positions = positions;
    c.spare_rows = positions == PositionShape::absent ? 0 : -50;
    const RotaryInputs in = with_grad(inputs(c), true, true, true, true);
    const at::Tensor grad_q = random(in.q.sizes());
    const at::Tensor grad_k = random(in.k.sizes());
    const auto run = [&] {
      const auto [q, k] = rotate_qk(in);
      return gradients({q, k}, {in.q, in.k, in.cos, in.sin}, {grad_q, grad_k});
    };
    const TensorList first = run();
    for (int repeat = 0; repeat < 2; ++repeat) {
      const TensorList again = run();
      for (size_t i = 0; i < first.size(); ++i) {
        expect_same_bits(again[i], first[i]);
      }
    }
  }
}

TEST_P(RotaryEmbeddingAutograd, EmptyTensorsHaveEmptyGradientsAndZeroTableGradients) {
  for (const int empty : {0, 1, 2}) {
    for (const PositionShape positions : {PositionShape::absent, PositionShape::per_batch}) {
      RotaryCase c;
      c.batch = empty == 0 ? 0 : c.batch;
      c.tokens = empty == 1 ? 0 : c.tokens;
      c.q_heads = c.k_heads = empty == 2 ? 0 : c.q_heads;
      c.positions = positions;
      SCOPED_TRACE(::testing::Message() << c);
      const RotaryInputs in = with_grad(inputs(c), true, true, true, true);
      const auto [q, k] = rotate_qk(in);
      (q.sum() + k.sum()).backward();
      EXPECT_EQ(in.q.grad().sizes(), in.q.sizes());
      EXPECT_EQ(in.k.grad().sizes(), in.k.sizes());
      expect_same_bits(in.cos.grad(), at::zeros_like(in.cos));
      expect_same_bits(in.sin.grad(), at::zeros_like(in.sin));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The graph

class RotaryEmbeddingGraph : public DeviceTest {
 protected:
  RotaryInputs inputs(bool q, bool k, bool cos, bool sin) const {
    return with_grad(make_inputs(RotaryCase(), {GetParam(), at::kFloat}), q, k, cos, sin);
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingGraph, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingGraph, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryEmbeddingGraph, OutputRequiresGradWhenAnyInputDoes) {
  EXPECT_FALSE(rotate(inputs(false, false, false, false), inputs(false, false, false, false).q).requires_grad());
  for (int i = 0; i < 3; ++i) {
    const RotaryInputs in = inputs(i == 0, false, i == 1, i == 2);
    EXPECT_TRUE(rotate(in, in.q).requires_grad()) << i;
  }
  const auto [q, k] = rotate_qk(inputs(false, false, false, false));
  EXPECT_FALSE(q.requires_grad());
  EXPECT_FALSE(k.requires_grad());
}

TEST_P(RotaryEmbeddingGraph, OutputIsNotALeaf) {
  const RotaryInputs in = inputs(true, true, false, false);
  const auto [q, k] = rotate_qk(in);
  EXPECT_FALSE(q.is_leaf());
  EXPECT_FALSE(k.is_leaf());
}

TEST_P(RotaryEmbeddingGraph, OnlyQueriesRequireGrad) {
  const RotaryInputs in = inputs(true, false, false, false);
  const auto [q, k] = rotate_qk(in);
  (q.sum() + k.sum()).backward();
  const RotaryInputs conjugate = backwards(in);
  expect_close_to_rounding(in.q.grad(), conjugate, at::ones_like(in.q));
  EXPECT_FALSE(in.k.grad().defined());
}

TEST_P(RotaryEmbeddingGraph, OnlyKeysRequireGrad) {
  const RotaryInputs in = inputs(false, true, false, false);
  const auto [q, k] = rotate_qk(in);
  (q.sum() + k.sum()).backward();
  const RotaryInputs conjugate = backwards(in);
  expect_close_to_rounding(in.k.grad(), conjugate, at::ones_like(in.k));
  EXPECT_FALSE(in.q.grad().defined());
}

TEST_P(RotaryEmbeddingGraph, OnlyTheRotatedQueriesAreUsed) {
  const RotaryInputs in = inputs(true, true, true, true);
  const at::Tensor q = std::get<0>(rotate_qk(in));
  q.sum().backward();
  const RotaryInputs conjugate = backwards(in);
  expect_close_to_rounding(in.q.grad(), conjugate, at::ones_like(in.q));
  EXPECT_TRUE(!in.k.grad().defined() || (in.k.grad() == 0).all().item<bool>());
  expect_table_gradients(in.cos.grad(), in.sin.grad(), scalar_table_gradients(in, {{at::ones_like(in.q), in.q}}));
}

TEST_P(RotaryEmbeddingGraph, OnlyTheRotatedKeysAreUsed) {
  const RotaryInputs in = inputs(true, true, true, true);
  const at::Tensor k = std::get<1>(rotate_qk(in));
  k.sum().backward();
  const RotaryInputs conjugate = backwards(in);
  expect_close_to_rounding(in.k.grad(), conjugate, at::ones_like(in.k));
  EXPECT_TRUE(!in.q.grad().defined() || (in.q.grad() == 0).all().item<bool>());
  expect_table_gradients(in.cos.grad(), in.sin.grad(), scalar_table_gradients(in, {{at::ones_like(in.k), in.k}}));
}

TEST_P(RotaryEmbeddingGraph, OnlyTheTableThatRequiresGradGetsOne) {
  for (const bool cos : {false, true}) {
    const RotaryInputs in = inputs(true, true, cos, !cos);
    const auto [q, k] = rotate_qk(in);
    (q.sum() + k.sum()).backward();
    EXPECT_EQ(in.cos.grad().defined(), cos);
    EXPECT_EQ(in.sin.grad().defined(), !cos);
    const at::Tensor ones_q = at::ones_like(in.q);
    const at::Tensor ones_k = at::ones_like(in.k);
    expect_table_gradients(in.cos.grad(), in.sin.grad(), scalar_table_gradients(in, {{ones_q, in.q}, {ones_k, in.k}}));
  }
}

TEST_P(RotaryEmbeddingGraph, SameTensorForQueriesAndKeysAddsTheGradients) {
  RotaryInputs in = inputs(true, false, false, false);
  in.k = in.q;
  const auto [q, k] = rotate_qk(in);
  at::Tensor grad = random_tensor(in.q.sizes(), {GetParam(), at::kFloat});
  torch::autograd::backward({q, k}, {grad, grad});
  const RotaryInputs conjugate = backwards(in);
  const at::Tensor once = rotate(conjugate, grad).detach();
  expect_same_bits(in.q.grad(), once + once);
}

TEST_P(RotaryEmbeddingGraph, GradientFlowsThroughANonLeaf) {
  const RotaryInputs in = inputs(false, false, false, false);
  const at::Tensor leaf = in.q.clone().requires_grad_();
  const at::Tensor y = rotate(in, leaf * 2);
  y.sum().backward();
  const RotaryInputs conjugate = backwards(in);
  expect_same_bits(leaf.grad(), rotate(conjugate, at::ones_like(leaf)) * 2);
}

TEST_P(RotaryEmbeddingGraph, RetainedGraphGivesTheGradientTwice) {
  const RotaryInputs in = inputs(true, true, true, true);
  const auto [q, k] = rotate_qk(in);
  const at::Tensor sum = q.sum() + k.sum();
  sum.backward({}, /*retain_graph=*/true);
  const at::Tensor once = in.q.grad().clone();
  const at::Tensor once_cos = in.cos.grad().clone();
  sum.backward();
  expect_same_bits(in.q.grad(), once * 2);
  expect_same_bits(in.cos.grad(), once_cos * 2);
}

TEST_P(RotaryEmbeddingGraph, SecondBackwardThroughAFreedGraphIsAnError) {
  const RotaryInputs in = inputs(true, true, false, false);
  const auto [q, k] = rotate_qk(in);
  const at::Tensor sum = q.sum() + k.sum();
  sum.backward();
  expect_error([&] { sum.backward(); }, {"backward through the graph a second time"});
}

TEST_P(RotaryEmbeddingGraph, TablesChangedInPlaceBeforeBackwardAreAnError) {
  RotaryInputs in = inputs(true, true, false, false);
  const auto [q, k] = rotate_qk(in);
  const at::Tensor sum = q.sum() + k.sum();
  in.cos.mul_(2);
  expect_error([&] { sum.backward(); }, {"modified by an inplace operation"});
}

TEST_P(RotaryEmbeddingGraph, InputsChangedInPlaceDoNotMatterWithoutTableGradients) {
  RotaryInputs in = inputs(false, false, false, false);
  const at::Tensor leaf = in.q.clone().requires_grad_();
  in.q = leaf * 1;
  const at::Tensor y = rotate(in, in.q);
  {
    const at::NoGradGuard no_grad;
    in.q.zero_();
  }
  y.sum().backward();
  const RotaryInputs conjugate = backwards(in);
  expect_same_bits(leaf.grad(), rotate(conjugate, at::ones_like(leaf)));
}

TEST_P(RotaryEmbeddingGraph, OutputMayBeChangedInPlace) {
  const RotaryInputs in = inputs(true, true, true, true);
  at::Tensor y = rotate(in, in.q);
  y.mul_(2);
  y.sum().backward();
  const RotaryInputs conjugate = backwards(in);
  expect_same_bits(in.q.grad(), rotate(conjugate, at::full_like(in.q, 2)));
}

TEST_P(RotaryEmbeddingGraph, NoGradModeRecordsNothing) {
  const RotaryInputs in = inputs(true, true, true, true);
  const at::NoGradGuard no_grad;
  const auto [q, k] = rotate_qk(in);
  EXPECT_FALSE(q.requires_grad());
  EXPECT_FALSE(k.requires_grad());
  expect_close_to_rounding(q, in, in.q);
}

TEST_P(RotaryEmbeddingGraph, InferenceModeWorks) {
  const c10::InferenceMode inference;
  const RotaryInputs in = make_inputs(RotaryCase(), {GetParam(), at::kFloat});
  const auto [q, k] = rotate_qk(in);
  EXPECT_TRUE(q.is_inference());
  EXPECT_FALSE(q.requires_grad());
  expect_close_to_rounding(q, in, in.q);
  expect_close_to_rounding(k, in, in.k);
}

TEST_P(RotaryEmbeddingGraph, GradientHasTheLayoutOfADenseInput) {
  RotaryCase c;
  c.q_strides = c.k_strides = Strides::head_major;
  const RotaryInputs in = with_grad(make_inputs(c, {GetParam(), at::kFloat}), true, true, false, false);
  const auto [q, k] = rotate_qk(in);
  torch::autograd::backward({q, k}, {at::ones_like(q), at::ones_like(k)});
  EXPECT_EQ(in.q.grad().strides(), in.q.strides());
  EXPECT_EQ(in.k.grad().strides(), in.k.strides());
}

TEST_P(RotaryEmbeddingGraph, DeterministicAlgorithmsAreNoErrorAndNoElementIsLeftUnwritten) {
  for (const RotaryCase& c : small_cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = with_grad(make_inputs(c, {GetParam(), at::kFloat}), true, true, true, true);
    const auto run = [&] {
      const auto [q, k] = rotate_qk(in);
      TensorList results = gradients({q, k}, {in.q, in.k, in.cos, in.sin}, {at::ones_like(q), at::ones_like(k)});
      results.push_back(q);
      results.push_back(k);
      return results;
    };
    const TensorList expected = run();
    const DeterministicAlgorithms deterministic;
    const TensorList found = run();
    for (size_t i = 0; i < expected.size(); ++i) {
      expect_same_bits(found[i], expected[i]);
      EXPECT_FALSE(found[i].isnan().any().item<bool>());
    }
  }
}

TEST_P(RotaryEmbeddingGraph, ForwardModeTangentIsTheDerivative) {
  const RotaryInputs in = make_inputs(RotaryCase(), {GetParam(), at::kDouble});
  const TensorList tangents = random_like({in.q, in.k, in.cos, in.sin});
  const uint64_t level = torch::autograd::forward_ad::enter_dual_level();
  RotaryInputs dual = in;
  const auto level_of = static_cast<int64_t>(level);
  dual.q = at::_make_dual(in.q, tangents[0], level_of);
  dual.k = at::_make_dual(in.k, tangents[1], level_of);
  dual.cos = at::_make_dual(in.cos, tangents[2], level_of);
  dual.sin = at::_make_dual(in.sin, tangents[3], level_of);
  const auto [q, k] = rotate_qk(dual);
  const at::Tensor q_tangent = std::get<1>(at::_unpack_dual(q, level_of));
  const at::Tensor k_tangent = std::get<1>(at::_unpack_dual(k, level_of));
  // The rotation is bilinear: its derivative is x's tangent rotated by cos and sin, plus x rotated by their tangents.
  RotaryInputs tables = in;
  tables.cos = tangents[2];
  tables.sin = tangents[3];
  const auto expect_tangent = [&](const at::Tensor& actual, const at::Tensor& x, const at::Tensor& tangent) {
    const at::Tensor expected = scalar_rotation(in, tangent) + scalar_rotation(tables, x);
    expect_within(actual, expected, expected.abs() * 1e-12 + 1e-12);
  };
  expect_tangent(q_tangent, in.q, tangents[0]);
  expect_tangent(k_tangent, in.k, tangents[1]);
  torch::autograd::forward_ad::exit_dual_level(level);
}

}  // namespace
}  // namespace posenc::test
