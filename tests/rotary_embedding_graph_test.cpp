#include "gradcheck.h"
#include "rotary_embedding_autograd_support.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

// rotary_embedding in the graph of autograd.
namespace posenc::test {
namespace {

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
  for (const RotaryCase& c : small_rotary_cases()) {
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
