#include "gradcheck.h"
#include "qk_norm_support.h"

#include <posenc/qk_norm_rotary_embedding.h>

#include <ATen/ATen.h>

#include <random>
#include <tuple>

namespace posenc::test {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Behaviour for every dtype

class QKNormRotaryEmbedding : public TargetTest {
 protected:
  QKNormInputs inputs(const RotaryCase& c = RotaryCase(), bool unit_offset = false) const {
    return make_qk_norm_inputs(c, GetParam(), unit_offset);
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, QKNormRotaryEmbedding, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, QKNormRotaryEmbedding, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(QKNormRotaryEmbedding, ReferenceMatchesTheScalarLoop) {
  for (const bool unit_offset : {false, true}) {
    RotaryCase c;
    c.head_dim = 20;
    c.interleaved = unit_offset;
    c.positions = PositionShape::per_batch;
    const QKNormInputs in = inputs(c, unit_offset);
    const auto [q, k] = qk_norm_rotate_reference(in);
    EXPECT_EQ(q.scalar_type(), dtype());
    expect_within(q, scalar_qk_norm(in, in.rotary.q, in.q_weight));
    expect_within(k, scalar_qk_norm(in, in.rotary.k, in.k_weight));
  }
}

TEST_P(QKNormRotaryEmbedding, NumbersOfAHandComputation) {
  // The mean square of (1, 7, 5, 5) is 25 and eps is negligible, so x is divided by 5. A rotation by 90 degrees turns
  // (a, b, c, d) with pairs (a, c) and (b, d) into (-c, -d, a, b).
  const at::Tensor x = at::tensor({1.0, 7.0, 5.0, 5.0}, at::kDouble).to(device(), dtype()).view({1, 1, 1, 4});
  const at::Tensor weight = at::tensor({5.0, 10.0, 2.5, 20.0}, at::kDouble).to(device(), dtype());
  const at::Tensor cos = at::zeros({1, 2}, x.options().dtype(table_dtype(dtype())));
  const at::Tensor sin = at::ones_like(cos);
  const auto [q, k] = posenc::qk_norm_rotary_embedding(x, x, weight, weight, cos, sin, std::nullopt, /*eps=*/1e-30);
  const at::Tensor expected = at::tensor({-2.5, -20.0, 1.0, 14.0}, at::kDouble);
  const at::Tensor bound = expected.abs() * 2 * unit_roundoff(dtype()) + expected.abs() * 8 * unit_roundoff(at::kFloat);
  expect_within(q.flatten(), expected, bound);
  expect_within(k.flatten(), expected, bound);
}

TEST_P(QKNormRotaryEmbedding, UnitOffsetAddsOneToTheWeights) {
  QKNormInputs plain = inputs();
  plain.q_weight = at::ones_like(plain.q_weight) * 1.5;
  plain.k_weight = at::ones_like(plain.k_weight);
  QKNormInputs offset = plain;
  offset.unit_offset = true;
  offset.q_weight = plain.q_weight - 1;
  offset.k_weight = plain.k_weight - 1;
  const auto [plain_q, plain_k] = qk_norm_rotate(plain);
  const auto [offset_q, offset_k] = qk_norm_rotate(offset);
  expect_same_bits(offset_q, plain_q);
  expect_same_bits(offset_k, plain_k);
}

TEST_P(QKNormRotaryEmbedding, EachTensorHasItsOwnWeight) {
  QKNormInputs in = inputs();
  in.rotary.k = in.rotary.q;
  in.k_weight = in.q_weight * 2;
  const auto [q, k] = qk_norm_rotate(in);
  expect_same_bits(k, q * 2);
}

TEST_P(QKNormRotaryEmbedding, StridedWeightsMatchTheScalarLoop) {
  RotaryCase c;
  c.head_dim = c.rotary_dim = 32;
  QKNormInputs in = inputs(c);
  const at::Tensor storage = at::randn({32, 3}, at::kDouble).to(device(), dtype());
  // Aligned, so that only the strides prevent vector loads.
  in.q_weight = storage.select(1, 0);
  in.k_weight = storage.select(1, 0).narrow(0, 0, 1).expand({32});
  expect_qk_norm_results(
      in, random_tensor(in.rotary.q.sizes(), GetParam()), random_tensor(in.rotary.k.sizes(), GetParam()));
}

TEST_P(QKNormRotaryEmbedding, UnalignedWeightsMatchTheScalarLoop) {
  RotaryCase c;
  c.head_dim = c.rotary_dim = 32;
  QKNormInputs in = inputs(c);
  in.q_weight = at::randn({33}, at::kDouble).to(device(), dtype()).narrow(0, 1, 32);
  expect_qk_norm_results(
      in, random_tensor(in.rotary.q.sizes(), GetParam()), random_tensor(in.rotary.k.sizes(), GetParam()));
}

TEST_P(QKNormRotaryEmbedding, EpsIsAddedToTheMeanSquare) {
  QKNormInputs in = inputs();
  in.eps = 0.5;
  expect_qk_norm_results(
      in, random_tensor(in.rotary.q.sizes(), GetParam()), random_tensor(in.rotary.k.sizes(), GetParam()));
}

TEST_P(QKNormRotaryEmbedding, HeadsOfZerosGiveZerosAndTheGradientOfAFactor) {
  QKNormInputs in = inputs();
  in.rotary.q = at::zeros_like(in.rotary.q);
  in.eps = 0x1p-12;  // 1 / sqrt(eps) is 64
  const QKNormInputs leaves = with_leaves(in, /*tables=*/false);
  const auto [q, k] = qk_norm_rotate(leaves);
  EXPECT_TRUE((q == 0).all().item<bool>());
  const at::Tensor grad = random_tensor(q.sizes(), GetParam());
  const TensorList found = gradients({q}, {leaves.rotary.q, leaves.q_weight}, {grad});
  expect_within(found[0], scalar_qk_norm_gradients(in, in.rotary.q, in.q_weight, grad).input);
  EXPECT_TRUE((found[1] == 0).all().item<bool>());
}

TEST_P(QKNormRotaryEmbedding, ValuesWhoseSquaresOverflowGiveZeros) {
  if (dtype() == at::kHalf || dtype() == at::kDouble) {
    GTEST_SKIP() << "no value of this dtype does, within reason";
  }
  QKNormInputs in = inputs();
  in.rotary.q = at::full_like(in.rotary.q, 1e30);
  const QKNormInputs leaves = with_leaves(in, /*tables=*/false);
  const auto [q, k] = qk_norm_rotate(leaves);
  EXPECT_TRUE((q == 0).all().item<bool>());
  expect_within(k, scalar_qk_norm(in, in.rotary.k, in.k_weight));
}

TEST_P(QKNormRotaryEmbedding, LargestValuesOfHalfDoNotOverflow) {
  QKNormInputs in = inputs();
  in.rotary.q = at::sign(in.rotary.q.to(at::kDouble)).mul(65504).to(dtype());
  expect_qk_norm_results(
      in, random_tensor(in.rotary.q.sizes(), GetParam()), random_tensor(in.rotary.k.sizes(), GetParam()));
}

TEST_P(QKNormRotaryEmbedding, PositionOutsideTheTableGivesNanForItsTokenOnly) {
  for (const int64_t head_dim : {16, 32, 37}) {
    RotaryCase c;
    c.head_dim = head_dim;
    QKNormInputs in = inputs(c);
    for (const int64_t outside : positions_outside(in.rotary.cos.size(0))) {
      SCOPED_TRACE(outside);
      const auto positions_with = [&](int64_t third) {
        return at::tensor({int64_t{1}, int64_t{0}, third, int64_t{3}, int64_t{2}}, at::kLong).to(device());
      };
      in.rotary.positions = positions_with(0);
      const QKNormInputs good = with_leaves(in, /*tables=*/false);
      const auto [good_q, good_k] = qk_norm_rotate(good);
      in.rotary.positions = positions_with(outside);
      const QKNormInputs bad = with_leaves(in, /*tables=*/false);
      const auto [bad_q, bad_k] = qk_norm_rotate(bad);
      const TensorList good_grads = gradients({good_q}, {good.rotary.q}, {at::ones_like(good_q)});
      const TensorList bad_grads = gradients({bad_q}, {bad.rotary.q}, {at::ones_like(bad_q)});
      const at::Tensor others = at::tensor({0, 1, 3, 4}, at::kLong).to(device());
      for (const auto& [actual, expected] :
           {std::pair(bad_q, good_q), std::pair(bad_k, good_k), std::pair(bad_grads[0], good_grads[0])}) {
        EXPECT_TRUE(actual.select(1, 2).isnan().all().item<bool>());
        expect_same_bits(actual.index_select(1, others), expected.index_select(1, others));
      }
    }
  }
}

TEST_P(QKNormRotaryEmbedding, PositionOfAnAxisOutsideTheTableGivesNanForThePairsThatReadIt) {
  RotaryCase c;
  c.batch = 1;
  c.tokens = 3;
  c.head_dim = 24;  // larger than rotary_dim, 16
  QKNormInputs in = inputs(c);
  in.rotary.pair_axes = {0, 0, 0, 0, 1, 1, 1, 1};
  const auto positions = [&](int64_t outside) {
    return at::tensor({int64_t{0}, int64_t{1}, int64_t{2}, int64_t{2}, outside, int64_t{0}}, at::kLong)
        .view({2, 3})
        .to(device());
  };
  in.rotary.positions = positions(1);
  const at::Tensor good = std::get<0>(qk_norm_rotate(in));
  for (const int64_t outside : positions_outside(in.rotary.cos.size(0))) {
    in.rotary.positions = positions(outside);
    const at::Tensor bad = std::get<0>(qk_norm_rotate(in));
    at::Tensor touched = at::zeros(bad.sizes(), at::kBool);
    touched[0][1].narrow(-1, 4, 4).fill_(true);
    touched[0][1].narrow(-1, 12, 4).fill_(true);
    touched = touched.to(device());
    EXPECT_TRUE(at::equal(bad.isnan(), touched));
    expect_same_bits(bad.masked_fill(touched, 0), good.masked_fill(touched, 0));
  }
}

TEST_P(QKNormRotaryEmbedding, OutputKeepsTheLayoutOfADenseInput) {
  const RotaryCase c;
  QKNormInputs in = inputs(c);
  for (const Strides strides : {Strides::dense, Strides::head_major, Strides::token_major, Strides::reversed}) {
    in.rotary.q = random_tensor(c.sizes(c.q_heads), GetParam(), strides);
    in.rotary.k = random_tensor(c.sizes(c.k_heads), GetParam(), strides);
    const auto [q, k] = qk_norm_rotate(in);
    EXPECT_EQ(q.strides(), in.rotary.q.strides());
    EXPECT_EQ(k.strides(), in.rotary.k.strides());
  }
}

TEST_P(QKNormRotaryEmbedding, InputsAreNeitherWrittenNorAliased) {
  const QKNormInputs in = with_leaves(inputs(), /*tables=*/false);
  const TensorList arguments{in.rotary.q, in.rotary.k, in.q_weight, in.k_weight, in.rotary.cos, in.rotary.sin};
  TensorList copies;
  for (const at::Tensor& argument : arguments) {
    copies.push_back(argument.detach().clone());
  }
  const auto [q, k] = qk_norm_rotate(in);
  (q.sum() + k.sum()).backward();
  for (size_t i = 0; i < arguments.size(); ++i) {
    expect_same_bits(arguments[i], copies[i]);
    EXPECT_FALSE(q.is_alias_of(arguments[i]));
    EXPECT_FALSE(k.is_alias_of(arguments[i]));
  }
}

TEST_P(QKNormRotaryEmbedding, ResultsAndGradientsAreTheSameBitForBitEachTime) {
  RotaryCase c;
  c.batch = 3;
  c.tokens = 210;
  c.q_heads = 5;
  c.head_dim = c.rotary_dim = 32;
  c.positions = PositionShape::per_batch;
  const QKNormInputs in = with_leaves(inputs(c));
  const at::Tensor grad_q = random_tensor(in.rotary.q.sizes(), GetParam());
  const at::Tensor grad_k = random_tensor(in.rotary.k.sizes(), GetParam());
  const auto run = [&] {
    const auto [q, k] = qk_norm_rotate(in);
    TensorList results = gradients(
        {q, k}, {in.rotary.q, in.rotary.k, in.q_weight, in.k_weight, in.rotary.cos, in.rotary.sin}, {grad_q, grad_k});
    results.push_back(q);
    results.push_back(k);
    return results;
  };
  const TensorList first = run();
  for (int repeat = 0; repeat < 2; ++repeat) {
    const TensorList again = run();
    for (size_t i = 0; i < first.size(); ++i) {
      expect_same_bits(again[i], first[i]);
    }
  }
}

TEST_P(QKNormRotaryEmbedding, EmptyTensorsHaveEmptyGradientsAndZerosForTheWeights) {
  for (const int empty : {0, 1, 2}) {
    RotaryCase c;
    c.batch = empty == 0 ? 0 : c.batch;
    c.tokens = empty == 1 ? 0 : c.tokens;
    c.q_heads = c.k_heads = empty == 2 ? 0 : c.q_heads;
    SCOPED_TRACE(::testing::Message() << c);
    const QKNormInputs in = with_leaves(inputs(c));
    const auto [q, k] = qk_norm_rotate(in);
    EXPECT_EQ(q.sizes(), in.rotary.q.sizes());
    EXPECT_EQ(k.sizes(), in.rotary.k.sizes());
    (q.sum() + k.sum()).backward();
    EXPECT_EQ(in.rotary.q.grad().sizes(), in.rotary.q.sizes());
    for (const at::Tensor& tensor : {in.q_weight, in.k_weight, in.rotary.cos, in.rotary.sin}) {
      expect_same_bits(tensor.grad(), at::zeros_like(tensor));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Random calls

class QKNormRotaryEmbeddingRandom : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cpu, QKNormRotaryEmbeddingRandom, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, QKNormRotaryEmbeddingRandom, ::testing::Values(at::kCUDA), device_name);

// A failure prints its seed; POSENC_TEST_SEED=<seed> POSENC_TEST_CASES=1 repeats it alone.
TEST_P(QKNormRotaryEmbeddingRandom, CallsMatchTheScalarLoops) {
  const int64_t cases = env_int("POSENC_TEST_CASES", 100);
  for (int64_t i = 0; i < cases && !HasFailure(); ++i) {
    const uint64_t case_seed = seed() + static_cast<uint64_t>(i);
    SCOPED_TRACE(::testing::Message() << "POSENC_TEST_SEED=" << case_seed << " POSENC_TEST_CASES=1");
    at::manual_seed(case_seed);
    std::mt19937_64 generator(case_seed);
    const auto below = [&generator](int64_t limit) {
      return static_cast<int64_t>(generator() % static_cast<uint64_t>(limit));
    };
    const Target target = targets(GetParam())[static_cast<size_t>(below(4))];
    RotaryCase c;
    c.packed = below(4) == 0;
    c.batch = 1 + below(4);
    c.tokens = 1 + (below(4) == 0 ? below(130) : below(9));
    c.q_heads = 1 + below(9);
    c.k_heads = 1 + below(9);
    c.rotary_dim = below(2) == 0 ? 2 + 2 * below(70) : 16 * (1 + below(9));
    c.head_dim = c.rotary_dim + (below(2) == 0 ? 0 : below(2) == 0 ? below(40) : 8 * below(5));
    c.interleaved = below(2) == 0;
    c.conjugate = below(2) == 0;
    if (below(3) == 0) {
      c.q_strides = static_cast<Strides>(below(kStrides));
      c.k_strides = static_cast<Strides>(below(kStrides));
    }
    if (!c.packed && below(3) == 0) {
      c.tables = static_cast<TableShape>(below(kTableShapes));
    }
    c.table_strides = below(2) == 0 ? TableStrides::dense : static_cast<TableStrides>(below(kTableStrides));
    if (c.tables == TableShape::by_position && below(2) == 0) {
      c.positions = PositionShape::per_token;
      c.position_strides = static_cast<PositionStrides>(below(kPositionStrides));
      c.position_dtype = below(2) == 0 ? at::kInt : at::kLong;
    }
    if (c.positions == PositionShape::per_token && below(2) == 0) {
      c.axes = 1 + below(4);
      c.pair_axes = static_cast<PairAxes>(below(kPairAxes));
    }
    const bool unit_offset = below(2) == 0;
    const bool wide = below(2) == 0;
    SCOPED_TRACE(
        ::testing::Message() << target << ", " << c << (unit_offset ? ", unit offset" : "")
                             << (wide ? ", wide weights" : ""));
    const QKNormInputs in = make_qk_norm_inputs(c, target, unit_offset, wide);
    const auto grad_strides = below(2) == 0 ? Strides::dense : static_cast<Strides>(below(kStrides));
    expect_qk_norm_results(
        in, random_tensor(in.rotary.q.sizes(), target, grad_strides),
        random_tensor(in.rotary.k.sizes(), target, grad_strides));
  }
}

}  // namespace
}  // namespace posenc::test
