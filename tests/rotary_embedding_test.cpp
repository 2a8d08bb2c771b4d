#include "rotary_embedding_support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <limits>

namespace posenc::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbedding, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbedding, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(RotaryEmbedding, RotatesByTheFormula) {
  for (const bool interleaved : {false, true}) {
    RotaryCase c;
    c.head_dim = 12;
    c.rotary_dim = 10;
    c.interleaved = interleaved;
    c.positions = PositionShape::per_batch;
    const RotaryInputs in = make_inputs(c, GetParam());
    expect_within(rotate(in, in.q), scalar_rotation(in, in.q), rounding_bound(in, in.q));
  }
}

TEST_P(RotaryEmbedding, AQuarterTurnSwapsThePairExactly) {
  const at::Tensor x = at::arange(1, 5, at::kDouble).to(device(), dtype()).view({1, 1, 1, 4});
  const at::Tensor cos = at::zeros({1, 2}, x.options().dtype(table_dtype(dtype())));
  const at::Tensor sin = at::ones_like(cos);
  const auto expect_values = [this](const at::Tensor& actual, const std::vector<double>& values) {
    expect_same_bits(actual.flatten(), at::tensor(values, at::kDouble).to(dtype()));
  };
  expect_values(posenc::rotary_embedding(x, cos, sin), {-3, -4, 1, 2});
  expect_values(posenc::rotary_embedding(x, cos, sin, std::nullopt, /*interleaved=*/true), {-2, 1, -4, 3});
  expect_values(posenc::rotary_embedding(x, cos, sin, std::nullopt, false, /*conjugate=*/true), {3, 4, -1, -2});
  expect_values(posenc::rotary_embedding(x, cos, sin, std::nullopt, true, /*conjugate=*/true), {2, -1, 4, -3});
}

TEST_P(RotaryEmbedding, AtPositionZeroNothingChanges) {
  const RotaryInputs in = model_inputs(RotaryCase());
  const at::Tensor zeros = positions(std::vector<int64_t>(static_cast<size_t>(in.q.size(1)), 0));
  expect_same_bits(posenc::rotary_embedding(in.q, in.cos, in.sin, zeros), in.q);
}

TEST_P(RotaryEmbedding, ConjugateUndoesTheRotation) {
  for (const bool interleaved : {false, true}) {
    RotaryCase c;
    c.interleaved = interleaved;
    c.head_dim = 24;
    RotaryInputs in = model_inputs(c);
    const at::Tensor there = rotate(in, in.q);
    in.conjugate = true;
    // Both rotations round. The second propagates the error of the first, at most sqrt(2) times in one element. The
    // rounding of cos and sin makes cos^2 + sin^2 differ from 1.
    const at::Tensor once = rounding_bound(in, in.q).amax(-1, /*keepdim=*/true);
    const at::Tensor twice = rounding_bound(in, there).amax(-1, /*keepdim=*/true);
    const at::Tensor table = in.q.cpu().to(at::kDouble).abs() * 4 * unit_roundoff(table_dtype(dtype()));
    expect_within(rotate(in, there), in.q.cpu().to(at::kDouble), once * 2 + twice + table);
  }
}

TEST_P(RotaryEmbedding, NormOfEveryPairIsPreserved) {
  RotaryCase c;
  c.interleaved = true;
  const RotaryInputs in = model_inputs(c);
  const auto norms = [](const at::Tensor& x) {
    return x.cpu().to(at::kDouble).unflatten(-1, {x.size(-1) / 2, 2}).norm(2, -1);
  };
  // The norm has at most the norm of the errors of the two elements, and the rounding error of cos and sin.
  const at::Tensor bound = norms(rounding_bound(in, in.q)) + norms(in.q) * 2 * unit_roundoff(table_dtype(dtype()));
  expect_within(norms(rotate(in, in.q)), norms(in.q), bound);
}

TEST_P(RotaryEmbedding, ScoresDependOnTheDistanceOnly) {
  const RotaryInputs in = model_inputs(RotaryCase());
  const at::Tensor q = in.q.narrow(0, 0, 1).narrow(1, 0, 1);
  const at::Tensor k = in.k.narrow(0, 0, 1).narrow(1, 0, 1).narrow(2, 0, 1).expand_as(q);
  double tolerance = 0;
  const auto score = [&](int64_t i, int64_t j) {
    RotaryInputs at_i = in;
    RotaryInputs at_j = in;
    at_i.positions = positions({i});
    at_j.positions = positions({j});
    const at::Tensor q_error = rounding_bound(at_i, q);
    const at::Tensor k_error = rounding_bound(at_j, k);
    const at::Tensor rotated_q = rotate(at_i, q);
    const at::Tensor rotated_k = rotate(at_j, k);
    // Errors of q and k, and of the rounding of each entry of cos and sin.
    tolerance += inner_product(rotated_q.abs(), k_error) + inner_product(q_error, rotated_k.abs()) +
        inner_product(q_error, k_error) +
        2 * unit_roundoff(table_dtype(dtype())) * (inner_product(q, q) + inner_product(k, k));
    return inner_product(rotated_q, rotated_k);
  };
  const double near = score(7, 0);
  const double far = score(50, 43);
  EXPECT_NEAR(far, near, tolerance);
  EXPECT_GT(std::abs(score(50, 50) - near), tolerance);
}

TEST_P(RotaryEmbedding, PositionsInOrderEqualNoPositions) {
  const RotaryInputs in = make_inputs(RotaryCase(), GetParam());
  const at::Tensor in_order = at::arange(in.q.size(1), at::kInt).to(device());
  expect_same_bits(posenc::rotary_embedding(in.q, in.cos, in.sin, in_order), rotate(in, in.q));
}

TEST_P(RotaryEmbedding, TablesPerTokenEqualGatheredTables) {
  RotaryCase c;
  c.positions = PositionShape::per_batch;
  const RotaryInputs in = make_inputs(c, GetParam());
  const at::Tensor cos = in.cos.index({*in.positions});
  const at::Tensor sin = in.sin.index({*in.positions});
  expect_same_bits(posenc::rotary_embedding(in.q, cos, sin), rotate(in, in.q));
}

TEST_P(RotaryEmbedding, PairEqualsTwoCallsBitForBit) {
  RotaryCase c;
  c.q_heads = 7;
  c.k_heads = 2;
  const RotaryInputs in = make_inputs(c, GetParam());
  const auto [q, k] = rotate_qk(in);
  expect_same_bits(q, rotate(in, in.q));
  expect_same_bits(k, rotate(in, in.k));
}

TEST_P(RotaryEmbedding, StridesDoNotChangeTheResult) {
  const RotaryCase c;
  RotaryInputs in = make_inputs(c, GetParam());
  for (int i = 0; i < kStrides; ++i) {
    const at::Tensor x = random_tensor(c.sizes(c.q_heads), GetParam(), static_cast<Strides>(i));
    SCOPED_TRACE(i);
    expect_same_bits(rotate(in, x), rotate(in, x.contiguous()));
  }
}

TEST_P(RotaryEmbedding, SlicesOfAPackedProjectionMatchTheReference) {
  RotaryInputs in = make_inputs(RotaryCase(), GetParam());
  const at::Tensor qkv = random_tensor({2, 5, 4 + 2 + 2, 16}, GetParam());
  in.q = qkv.narrow(2, 0, 4);
  in.k = qkv.narrow(2, 4, 2);
  const auto [q, k] = rotate_qk(in);
  expect_close_to_rounding(q, in, in.q);
  expect_close_to_rounding(k, in, in.k);
}

TEST_P(RotaryEmbedding, OutputKeepsTheLayoutOfADenseInput) {
  const RotaryCase c;
  RotaryInputs in = make_inputs(c, GetParam());
  for (const Strides strides :
       {Strides::dense, Strides::head_major, Strides::token_major, Strides::odd_offset, Strides::reversed}) {
    in.q = random_tensor(c.sizes(c.q_heads), GetParam(), strides);
    in.k = random_tensor(c.sizes(c.k_heads), GetParam(), strides);
    EXPECT_EQ(rotate(in, in.q).strides(), in.q.strides());
    const auto [q, k] = rotate_qk(in);
    EXPECT_EQ(q.strides(), in.q.strides());
    EXPECT_EQ(k.strides(), in.k.strides());
  }
}

TEST_P(RotaryEmbedding, OutputOfAnInputWithHolesIsDense) {
  const RotaryCase c;
  const RotaryInputs in = make_inputs(c, GetParam());
  for (const Strides strides : {Strides::head_slice, Strides::every_other, Strides::one_head, Strides::one_value}) {
    const at::Tensor x = random_tensor(c.sizes(c.q_heads), GetParam(), strides);
    EXPECT_TRUE(rotate(in, x).is_non_overlapping_and_dense());
  }
}

TEST_P(RotaryEmbedding, InputsAreNeitherWrittenNorAliased) {
  RotaryCase c;
  c.positions = PositionShape::per_token;
  const RotaryInputs in = make_inputs(c, GetParam());
  const std::vector<at::Tensor> arguments{in.q, in.k, in.cos, in.sin, *in.positions};
  std::vector<at::Tensor> copies;
  copies.reserve(arguments.size());
  for (const at::Tensor& argument : arguments) {
    copies.push_back(argument.clone());
  }
  const auto [q, k] = rotate_qk(in);
  for (size_t i = 0; i < arguments.size(); ++i) {
    expect_same_bits(arguments[i], copies[i]);
    EXPECT_FALSE(q.is_alias_of(arguments[i]));
    EXPECT_FALSE(k.is_alias_of(arguments[i]));
  }
  EXPECT_FALSE(q.is_alias_of(k));
}

TEST_P(RotaryEmbedding, SameTensorForQueriesAndKeysGivesTwoResults) {
  RotaryInputs in = make_inputs(RotaryCase(), GetParam());
  in.k = in.q;
  const auto [q, k] = rotate_qk(in);
  EXPECT_FALSE(q.is_alias_of(k));
  expect_same_bits(q, rotate(in, in.q));
  expect_same_bits(k, q);
}

TEST_P(RotaryEmbedding, ForwardIsTheSameBitForBitEachTime) {
  RotaryCase c;
  c.batch = 3;
  c.tokens = 70;
  c.positions = PositionShape::per_batch;
  const RotaryInputs in = make_inputs(c, GetParam());
  const auto [first_q, first_k] = rotate_qk(in);
  for (int i = 0; i < 2; ++i) {
    const auto [q, k] = rotate_qk(in);
    expect_same_bits(q, first_q);
    expect_same_bits(k, first_k);
  }
}

TEST_P(RotaryEmbedding, InfinityAndNanStayInTheirPair) {
  RotaryInputs in = make_inputs(RotaryCase(), GetParam());
  const at::Tensor clean = rotate(in, in.q);
  in.q[1][2][3][5].fill_(std::numeric_limits<double>::quiet_NaN());
  in.q[0][1][2][6].fill_(std::numeric_limits<double>::infinity());
  const at::Tensor y = rotate(in, in.q);
  at::Tensor touched = at::zeros(y.sizes(), at::kBool);
  for (const int64_t channel : {5, 13}) {
    touched[1][2][3][channel].fill_(true);
    EXPECT_TRUE(y[1][2][3][channel].isnan().item<bool>());
  }
  for (const int64_t channel : {6, 14}) {
    touched[0][1][2][channel].fill_(true);
    EXPECT_TRUE(y[0][1][2][channel].isinf().item<bool>());
  }
  touched = touched.to(device());
  expect_same_bits(y.masked_fill(touched, 0), clean.masked_fill(touched, 0));
}

TEST_P(RotaryEmbedding, EmptyTensorsWork) {
  for (const int empty : {0, 1, 2}) {
    RotaryCase c;
    c.batch = empty == 0 ? 0 : c.batch;
    c.tokens = empty == 1 ? 0 : c.tokens;
    c.q_heads = empty == 2 ? 0 : c.q_heads;
    for (const auto& [shape, axes] : std::vector<std::pair<PositionShape, int64_t>>{
             {PositionShape::absent, 0},
             {PositionShape::per_token, 0},
             {PositionShape::per_batch, 0},
             {PositionShape::per_batch, 3}}) {
      c.positions = shape;
      c.axes = axes;
      const RotaryInputs in = make_inputs(c, GetParam());
      SCOPED_TRACE(::testing::Message() << c);
      EXPECT_EQ(rotate(in, in.q).sizes(), in.q.sizes());
      const auto [q, k] = rotate_qk(in);
      EXPECT_EQ(q.sizes(), in.q.sizes());
      expect_close_to_rounding(k, in, in.k);
    }
  }
}

}  // namespace
}  // namespace posenc::test
