#include "gradcheck.h"
#include "rotary_embedding_autograd_support.h"

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

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
  for (const RotaryCase& c : small_rotary_cases()) {
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
  for (const RotaryCase& c : small_rotary_cases()) {
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
  std::vector<RotaryCase> cases = small_rotary_cases();
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

}  // namespace
}  // namespace posenc::test
