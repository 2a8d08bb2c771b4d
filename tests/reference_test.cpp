#include "gradcheck.h"
#include "support.h"

#include <posenc/reference.h>

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

/// The reference version against the scalar loop. Other tests rely on both.
class Reference : public ::testing::TestWithParam<RotaryCase> {
 protected:
  RotaryInputs inputs(at::ScalarType dtype) const { return make_inputs(GetParam(), {at::kCPU, dtype}); }
};

std::vector<RotaryCase> reference_cases() {
  std::vector<RotaryCase> cases;
  for (const bool interleaved : {false, true}) {
    for (const bool conjugate : {false, true}) {
      const auto add = [&](const std::string& name, const std::function<void(RotaryCase&)>& change) {
        RotaryCase c;
        c.name = name + (interleaved ? "Interleaved" : "Half") + (conjugate ? "Conjugate" : "");
        c.tokens = 3;
        c.q_heads = 3;
        c.k_heads = 1;
        c.head_dim = 9;
        c.rotary_dim = 6;
        c.interleaved = interleaved;
        c.conjugate = conjugate;
        change(c);
        cases.push_back(c);
      };
      add("Partial", [](RotaryCase&) {});
      add("FullWidth", [](RotaryCase& c) { c.head_dim = 6; });
      add("OnePair", [](RotaryCase& c) { c.head_dim = c.rotary_dim = 2; });
      add("Packed", [](RotaryCase& c) { c.packed = true; });
      add("PackedPositions", [](RotaryCase& c) {
        c.packed = true;
        c.positions = PositionShape::per_token;
      });
      add("PositionsPerToken", [](RotaryCase& c) { c.positions = PositionShape::per_token; });
      add("PositionsPerBatchInt32", [](RotaryCase& c) {
        c.positions = PositionShape::per_batch;
        c.position_dtype = at::kInt;
        c.position_strides = PositionStrides::every_other;
      });
      add("Axes", [](RotaryCase& c) {
        c.positions = PositionShape::per_batch;
        c.axes = 2;
        c.pair_axes = PairAxes::cycled;
      });
      add("AxesPerTokenInt32", [](RotaryCase& c) {
        c.positions = PositionShape::per_token;
        c.position_dtype = at::kInt;
        c.position_strides = PositionStrides::every_other;
        c.axes = 3;
      });
      add("AxesPacked", [](RotaryCase& c) {
        c.packed = true;
        c.positions = PositionShape::per_token;
        c.axes = 3;
      });
      add("TablesPerToken", [](RotaryCase& c) { c.tables = TableShape::per_token; });
      add("TablesPerTokenShared", [](RotaryCase& c) { c.tables = TableShape::per_token_shared; });
      add("Strided", [](RotaryCase& c) {
        c.q_strides = Strides::reversed;
        c.k_strides = Strides::one_value;
        c.table_strides = TableStrides::transposed;
      });
    }
  }
  return cases;
}

std::string case_name(const ::testing::TestParamInfo<RotaryCase>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(Cpu, Reference, ::testing::ValuesIn(reference_cases()), case_name);

/// Upper bound of |x1 c| + |x2 s| for these arguments.
double largest_sum(const RotaryInputs& in, const at::Tensor& x) {
  const auto largest = [](const at::Tensor& tensor) { return tensor.abs().max().item<double>(); };
  return largest(x) * (largest(in.cos) + largest(in.sin));
}

TEST_P(Reference, MatchesTheFormulaInFloat64) {
  const RotaryInputs in = inputs(at::kDouble);
  // Three roundings in each of the two computations.
  const double bound = 6 * unit_roundoff(at::kDouble) * largest_sum(in, in.q);
  expect_within(rotate_reference(in, in.q), scalar_rotation(in, in.q), at::full({}, bound, at::kDouble));
}

TEST_P(Reference, RoundsNarrowDtypesOnce) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    const RotaryInputs in = inputs(dtype);
    const at::Tensor actual = rotate_reference(in, in.q);
    EXPECT_EQ(actual.scalar_type(), dtype);
    const at::Tensor expected = scalar_rotation(in, in.q);
    const double in_float32 = 3 * unit_roundoff(at::kFloat) * largest_sum(in, in.q);
    const double v = dtype == at::kFloat ? 0 : unit_roundoff(dtype);
    expect_within(actual, expected, expected.abs() * v + in_float32 * (1 + v) + 0x1p-25);
  }
}

TEST(ReferenceOutside, TokensHaveNanInEveryChannelAndOthersNone) {
  RotaryCase c;
  c.head_dim = 9;
  c.rotary_dim = 6;
  c.positions = PositionShape::per_token;
  RotaryInputs in = make_inputs(c, {at::kCPU, at::kFloat});
  const int64_t rows = in.cos.size(0);
  in.positions = at::tensor({int64_t{0}, int64_t{-1}, rows - 1, rows, int64_t{1}}, at::kLong);
  const at::Tensor nan = rotate_reference(in, in.q).isnan();
  for (int64_t token = 0; token < 5; ++token) {
    EXPECT_EQ(nan.select(1, token).all().item<bool>(), token == 1 || token == 3) << token;
    EXPECT_EQ(nan.select(1, token).any().item<bool>(), token == 1 || token == 3) << token;
  }
}

TEST_P(Reference, PairIsTwoCalls) {
  const RotaryInputs in = inputs(at::kFloat);
  const auto [q, k] = posenc::reference::rotary_embedding_qk(
      in.q, in.k, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
  expect_same_bits(q, rotate_reference(in, in.q));
  expect_same_bits(k, rotate_reference(in, in.k));
}

TEST_P(Reference, GradientsMatchCentralDifferences) {
  const RotaryInputs in = inputs(at::kDouble);
  gradcheck(
      [&in](const TensorList& arguments) -> TensorList {
        return {posenc::reference::rotary_embedding(
            arguments[0], arguments[1], arguments[2], in.positions, in.interleaved, in.conjugate, in.pair_axes)};
      },
      {in.q.detach().requires_grad_(), in.cos.detach().requires_grad_(), in.sin.detach().requires_grad_()});
}

TEST_P(Reference, TableGradientsMatchTheScalarLoop) {
  RotaryInputs in = inputs(at::kDouble);
  in.cos.requires_grad_();
  in.sin.requires_grad_();
  const at::Tensor grad = at::randn(in.q.sizes(), at::kDouble);
  const TensorList found = gradients({rotate_reference(in, in.q)}, {in.cos, in.sin}, {grad});
  expect_table_gradients(found[0], found[1], scalar_table_gradients(in, {{grad, in.q}}));
}

TEST(ScalarLoop, ReadsTheAxisOfEachPair) {
  RotaryInputs in;
  in.cos = at::tensor({1.0, 10.0, 2.0, 20.0, 3.0, 30.0}, at::kDouble).view({3, 2});
  in.sin = at::zeros({3, 2}, at::kDouble);
  in.positions = at::tensor({0, 1, 2, 0}, at::kLong).view({2, 2});  // [A, S]
  in.pair_axes = {1, 0};
  const at::Tensor x = at::ones({1, 2, 1, 4}, at::kDouble);
  // Pair 0 reads axis 1: row 2 for token 0, row 0 for token 1. Pair 1 reads axis 0: row 0 and row 1.
  expect_same_bits(
      scalar_rotation(in, x).flatten(), at::tensor({3.0, 10.0, 3.0, 10.0, 1.0, 20.0, 1.0, 20.0}, at::kDouble));
}

TEST(ScalarLoop, IsTheFormula) {
  RotaryInputs in;
  in.cos = at::tensor({0.5, 2.0}, at::kDouble).view({1, 2});
  in.sin = at::tensor({3.0, -1.0}, at::kDouble).view({1, 2});
  const at::Tensor x = at::tensor({1.0, 2.0, 4.0, 8.0, 7.0}, at::kDouble).view({1, 1, 1, 5});
  const auto expect_values = [&](const std::vector<double>& values) {
    expect_same_bits(scalar_rotation(in, x).flatten(), at::tensor(values, at::kDouble));
  };
  // Pairs (1, 4) and (2, 8): 1 * 0.5 - 4 * 3, 2 * 2 + 8 * 1, 1 * 3 + 4 * 0.5, 2 * -1 + 8 * 2.
  expect_values({-11.5, 12, 5, 14, 7});
  in.conjugate = true;
  expect_values({12.5, -4, -1, 18, 7});
  in.interleaved = true;
  // Pairs (1, 2) and (4, 8): 1 * 0.5 + 2 * 3, -1 * 3 + 2 * 0.5, 4 * 2 - 8 * 1, 4 * 1 + 8 * 2.
  expect_values({6.5, -2, 0, 20, 7});
}

}  // namespace
}  // namespace posenc::test
