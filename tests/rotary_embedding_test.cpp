#include "support.h"

#include <posenc/frequencies.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

namespace posenc::test {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// A grid of shapes, strides and flags

/// Cases that each change one aspect of a default call. Widths include those around the vector lengths of every dtype:
/// 2, 4 and 8 elements (16 bytes) on a GPU, up to 16 floats on the CPU.
std::vector<RotaryCase> grid() {
  std::vector<RotaryCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.name = name;
    change(c);
    cases.push_back(c);
  };

  add("Default", [](RotaryCase&) {});
  for (const int64_t pairs : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 128}) {
    add("Pairs" + std::to_string(pairs), [=](RotaryCase& c) { c.head_dim = c.rotary_dim = 2 * pairs; });
  }
  for (const auto& [head_dim, rotary_dim] :
       std::vector<std::pair<int64_t, int64_t>>{{3, 2}, {7, 2}, {16, 14}, {17, 16}, {24, 16}, {65, 32}, {128, 64}}) {
    add("Head" + std::to_string(head_dim) + "Rotary" + std::to_string(rotary_dim),
        [h = head_dim, r = rotary_dim](RotaryCase& c) {
          c.head_dim = h;
          c.rotary_dim = r;
        });
  }
  for (const auto& [q_heads, k_heads] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 3}, {7, 5}, {8, 2}, {6, 1}, {1, 4}}) {
    add("Heads" + std::to_string(q_heads) + "And" + std::to_string(k_heads), [q = q_heads, k = k_heads](RotaryCase& c) {
      c.q_heads = q;
      c.k_heads = k;
    });
  }
  for (const auto& [batch, tokens] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {1, 33}, {5, 1}, {3, 17}, {33, 2}, {1, 300}}) {
    add("Batch" + std::to_string(batch) + "Tokens" + std::to_string(tokens), [b = batch, s = tokens](RotaryCase& c) {
      c.batch = b;
      c.tokens = s;
    });
  }
  add("Packed", [](RotaryCase& c) { c.packed = true; });
  add("PackedOneToken", [](RotaryCase& c) { c.packed = true, c.tokens = 1; });
  add("PackedPositions", [](RotaryCase& c) { c.packed = true, c.positions = PositionShape::per_token; });

  for (const at::ScalarType dtype : {at::kInt, at::kLong}) {
    const std::string suffix = at::toString(dtype);
    const auto add_positions = [&](const std::string& name, PositionShape shape, PositionStrides strides) {
      add(name + suffix, [=](RotaryCase& c) {
        c.positions = shape;
        c.position_strides = strides;
        c.position_dtype = dtype;
      });
    };
    add_positions("PositionPerToken", PositionShape::per_token, PositionStrides::dense);
    add_positions("PositionPerTokenStrided", PositionShape::per_token, PositionStrides::every_other);
    add_positions("PositionPerTokenExpanded", PositionShape::per_token, PositionStrides::expanded);
    add_positions("PositionPerBatch", PositionShape::per_batch, PositionStrides::dense);
    add_positions("PositionPerBatchStrided", PositionShape::per_batch, PositionStrides::every_other);
    add_positions("PositionPerBatchExpanded", PositionShape::per_batch, PositionStrides::expanded);
  }

  for (const auto& [name, axes, pattern] : std::vector<std::tuple<std::string, int64_t, PairAxes>>{
           {"OneAxis", 1, PairAxes::chunked},
           {"TwoAxes", 2, PairAxes::chunked},
           {"ThreeAxesCycled", 3, PairAxes::cycled},
           {"FourAxesRandom", 4, PairAxes::random}}) {
    const auto add_axes = [&, n = name, a = axes, p = pattern](
                              const std::string& suffix, const std::function<void(RotaryCase&)>& more) {
      add(n + suffix, [=](RotaryCase& c) {
        c.axes = a;
        c.pair_axes = p;
        c.positions = PositionShape::per_batch;
        more(c);
      });
    };
    add_axes("", [](RotaryCase&) {});
    for (const int64_t pairs : {1, 3, 8, 24, 33, 64}) {
      add_axes("Pairs" + std::to_string(pairs), [=](RotaryCase& c) { c.head_dim = c.rotary_dim = 2 * pairs; });
    }
    add_axes("Partial", [](RotaryCase& c) { c.head_dim = 24; });
    add_axes("PerToken", [](RotaryCase& c) { c.positions = PositionShape::per_token, c.position_dtype = at::kInt; });
    add_axes("Strided", [](RotaryCase& c) { c.position_strides = PositionStrides::every_other; });
    add_axes("Expanded", [](RotaryCase& c) { c.position_strides = PositionStrides::expanded; });
    add_axes("Packed", [](RotaryCase& c) { c.packed = true, c.positions = PositionShape::per_token; });
    add_axes("TableSlice", [](RotaryCase& c) { c.table_strides = TableStrides::slice; });
    add_axes("TableTransposed", [](RotaryCase& c) { c.table_strides = TableStrides::transposed; });
    add_axes("HeadSlice", [](RotaryCase& c) { c.q_strides = c.k_strides = Strides::head_slice; });
    add_axes("OneValue", [](RotaryCase& c) { c.q_strides = c.k_strides = Strides::one_value; });
    add_axes("Reversed", [](RotaryCase& c) { c.q_strides = c.k_strides = Strides::reversed; });
  }

  add("TableOfExactLength", [](RotaryCase& c) { c.spare_rows = 0; });
  add("TablePerToken", [](RotaryCase& c) { c.tables = TableShape::per_token; });
  add("TablePerTokenShared", [](RotaryCase& c) { c.tables = TableShape::per_token_shared; });
  for (const auto& [name, strides] : std::vector<std::pair<std::string, TableStrides>>{
           {"Slice", TableStrides::slice},
           {"Transposed", TableStrides::transposed},
           {"OneRow", TableStrides::one_row}}) {
    add("Table" + name, [t = strides](RotaryCase& c) { c.table_strides = t; });
    add("TableByPosition" + name, [t = strides](RotaryCase& c) {
      c.table_strides = t;
      c.positions = PositionShape::per_batch;
    });
    add("TablePerToken" + name, [t = strides](RotaryCase& c) {
      c.table_strides = t;
      c.tables = TableShape::per_token;
    });
  }

  for (const auto& [name, strides] : std::vector<std::pair<std::string, Strides>>{
           {"HeadMajor", Strides::head_major},
           {"TokenMajor", Strides::token_major},
           {"HeadSlice", Strides::head_slice},
           {"OddOffset", Strides::odd_offset},
           {"EveryOtherChannel", Strides::every_other},
           {"Reversed", Strides::reversed},
           {"OneBatch", Strides::one_batch},
           {"OneToken", Strides::one_token},
           {"OneHead", Strides::one_head},
           {"OneChannel", Strides::one_channel},
           {"OneValue", Strides::one_value}}) {
    add(name, [x = strides](RotaryCase& c) { c.q_strides = c.k_strides = x; });
    add(name + "KeysOnlyPartialByPosition", [x = strides](RotaryCase& c) {
      c.head_dim = 24;
      c.k_strides = x;
      c.positions = PositionShape::per_batch;
    });
    add(name + "Packed", [x = strides](RotaryCase& c) {
      c.packed = true;
      c.q_strides = c.k_strides = x;
    });
  }
  return cases;
}

using GridParam = std::tuple<Target, RotaryCase, bool>;

class RotaryEmbeddingGrid : public ::testing::TestWithParam<GridParam> {
 protected:
  void SetUp() override {
    require_device(target().device);
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    RotaryCase c = std::get<1>(GetParam());
    c.interleaved = std::get<2>(GetParam());
    inputs_ = make_inputs(c, target());
  }

  const Target& target() const { return std::get<0>(GetParam()); }

  RotaryInputs inputs_;
};

TEST_P(RotaryEmbeddingGrid, OneTensorMatchesTheReferenceInFloat64) {
  for (const bool conjugate : {false, true}) {
    SCOPED_TRACE(conjugate ? "conjugate" : "forward");
    inputs_.conjugate = conjugate;
    expect_close_to_rounding(rotate(inputs_, inputs_.q), inputs_, inputs_.q);
  }
}

TEST_P(RotaryEmbeddingGrid, PairMatchesTheReferenceInFloat64) {
  for (const bool conjugate : {false, true}) {
    SCOPED_TRACE(conjugate ? "conjugate" : "forward");
    inputs_.conjugate = conjugate;
    const auto [q, k] = rotate_qk(inputs_);
    {
      SCOPED_TRACE("q");
      expect_close_to_rounding(q, inputs_, inputs_.q);
    }
    SCOPED_TRACE("k");
    expect_close_to_rounding(k, inputs_, inputs_.k);
  }
}

std::string grid_name(const ::testing::TestParamInfo<GridParam>& info) {
  return std::string(at::toString(std::get<0>(info.param).dtype)) + (std::get<2>(info.param) ? "Interleaved" : "Half") +
      "Pairing" + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    RotaryEmbeddingGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCPU)), ::testing::ValuesIn(grid()), ::testing::Bool()),
    grid_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    RotaryEmbeddingGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCUDA)), ::testing::ValuesIn(grid()), ::testing::Bool()),
    grid_name);

// ---------------------------------------------------------------------------------------------------------------------
// Behaviour for every dtype

class RotaryEmbedding : public TargetTest {
 protected:
  /// Arguments with cos and sin of positions 0 to 63, as a model has them.
  RotaryInputs model_inputs(const RotaryCase& c) const {
    RotaryInputs in = make_inputs(c, GetParam());
    const auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(c.rotary_dim), 64, table_dtype(dtype()));
    in.cos = cos.to(device());
    in.sin = sin.to(device());
    return in;
  }

  at::Tensor positions(const std::vector<int64_t>& values) const { return at::tensor(values, at::kLong).to(device()); }
};

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

// ---------------------------------------------------------------------------------------------------------------------
// Positions outside the tables

TEST_P(RotaryEmbedding, PositionOutsideTheTableGivesNanForItsTokenOnly) {
  for (const int64_t rotary_dim : {16, 10}) {
    RotaryCase c;
    c.rotary_dim = rotary_dim;
    RotaryInputs in = model_inputs(c);
    for (const int64_t outside : positions_outside(64)) {
      SCOPED_TRACE(outside);
      in.positions = positions({3, 0, outside, 63, 2});
      const auto [q, k] = rotate_qk(in);
      for (const auto& [y, x] : {std::pair(q, in.q), std::pair(k, in.k), std::pair(rotate(in, in.q), in.q)}) {
        EXPECT_TRUE(y.select(1, 2).isnan().all().item<bool>());
        RotaryInputs inside = in;
        inside.positions = positions({3, 0, 0, 63, 2});
        at::Tensor expected = rotate(inside, x);
        const at::Tensor neighbours = positions({0, 1, 3, 4});
        expect_same_bits(y.index_select(1, neighbours), expected.index_select(1, neighbours));
      }
    }
  }
}

TEST_P(RotaryEmbedding, Int32PositionOutsideTheTableGivesNan) {
  RotaryInputs in = model_inputs(RotaryCase());
  for (const int64_t outside : {-1, 64, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    in.positions = positions({0, outside, 1, 2, 3}).to(at::kInt);
    EXPECT_TRUE(rotate(in, in.q).select(1, 1).isnan().all().item<bool>());
  }
}

TEST_P(RotaryEmbedding, PositionOutsideTheTableInOneBatchEntryLeavesTheOthers) {
  RotaryInputs in = model_inputs(RotaryCase());
  in.positions = positions({0, 1, 2, 3, 4, 0, 1, -7, 3, 4}).view({2, 5});
  const at::Tensor y = rotate(in, in.q);
  in.positions = std::nullopt;
  const at::Tensor expected = rotate(in, in.q);
  EXPECT_TRUE(y[1][2].isnan().all().item<bool>());
  expect_same_bits(y[0], expected[0]);
  expect_same_bits(y[1].narrow(0, 3, 2), expected[1].narrow(0, 3, 2));
}

TEST_P(RotaryEmbedding, PositionOutsideTheTableGivesNanForThePairsThatReadIt) {
  RotaryCase c;
  c.head_dim = 18;
  for (const bool interleaved : {false, true}) {
    c.interleaved = interleaved;
    RotaryInputs in = model_inputs(c);
    in.pair_axes = {0, 1, 1, 0, 2, 1, 0, 2};
    const at::Tensor inside = at::zeros({3, 5}, at::kLong).to(device());
    for (const int64_t outside : positions_outside(64)) {
      SCOPED_TRACE(outside);
      in.positions = inside;
      const at::Tensor expected = rotate(in, in.q);
      in.positions = inside.clone();
      (*in.positions)[1][2].fill_(outside);
      at::Tensor reads = at::zeros(in.q.sizes(), at::kBool);
      for (const int64_t pair : {1, 2, 5}) {
        reads.select(1, 2).select(-1, interleaved ? 2 * pair : pair).fill_(true);
        reads.select(1, 2).select(-1, interleaved ? 2 * pair + 1 : pair + 8).fill_(true);
      }
      for (const at::Tensor& y : {rotate(in, in.q), std::get<0>(rotate_qk(in)), rotate_reference(in, in.q)}) {
        EXPECT_TRUE(at::equal(y.isnan().cpu(), reads));
        expect_same_bits(y.cpu().masked_fill(reads, 0), expected.cpu().masked_fill(reads, 0));
      }
    }
  }
}

TEST_P(RotaryEmbedding, AxisThatNoPairReadsDoesNotMatter) {
  RotaryInputs in = model_inputs(RotaryCase());
  in.pair_axes = std::vector<int64_t>(8, 1);
  in.positions = at::stack({at::full({5}, -1, at::kLong), at::arange(5)}).to(device());
  expect_same_bits(rotate(in, in.q), posenc::rotary_embedding(in.q, in.cos, in.sin));
}

TEST_P(RotaryEmbedding, AxesOfEqualPositionsEqualOneAxisBitForBit) {
  for (const bool interleaved : {false, true}) {
    RotaryCase c;
    c.positions = PositionShape::per_batch;
    c.interleaved = interleaved;
    c.head_dim = 24;
    RotaryInputs in = make_inputs(c, GetParam());
    const auto [q, k] = rotate_qk(in);
    in.positions = in.positions->expand({3, c.batch, c.tokens});
    in.pair_axes = {0, 1, 2, 0, 1, 2, 0, 1};
    const auto [q_of_axes, k_of_axes] = rotate_qk(in);
    expect_same_bits(q_of_axes, q);
    expect_same_bits(k_of_axes, k);
  }
}

TEST_P(RotaryEmbedding, TablesMayHaveDifferentStrides) {
  for (const TableShape shape : {TableShape::by_position, TableShape::per_token}) {
    for (const bool with_axes : {false, true}) {
      RotaryCase c;
      c.tables = shape;
      c.axes = with_axes && shape == TableShape::by_position ? 2 : 0;
      c.positions = c.axes > 0 ? PositionShape::per_batch : PositionShape::absent;
      RotaryInputs in = make_inputs(c, GetParam());
      const auto [q, k] = rotate_qk(in);
      const auto expect_same = [&, expected_q = q, expected_k = k] {
        const auto [actual_q, actual_k] = rotate_qk(in);
        expect_same_bits(actual_q, expected_q);
        expect_same_bits(actual_k, expected_k);
      };
      const at::Tensor cos = in.cos;
      const at::Tensor sin = in.sin;
      const auto columns_apart = [](const at::Tensor& x) { return at::stack({x, x + 1}, -1).select(-1, 0); };
      const auto rows_apart = [](const at::Tensor& x) { return at::cat({x, x + 1}, -1).narrow(-1, 0, x.size(-1)); };
      in.cos = columns_apart(cos);
      expect_same();
      in.cos = rows_apart(cos);
      expect_same();
      in.cos = cos;
      in.sin = columns_apart(sin);
      expect_same();
      in.sin = rows_apart(sin);
      expect_same();
    }
  }
}

/// Enables the position check for the lifetime of the object.
class PositionCheck {
 public:
  PositionCheck() : before_(posenc::position_check()) { posenc::set_position_check(true); }
  ~PositionCheck() { posenc::set_position_check(before_); }
  PositionCheck(const PositionCheck&) = delete;
  PositionCheck& operator=(const PositionCheck&) = delete;

 private:
  bool before_;
};

TEST_P(RotaryEmbedding, CheckedPositionOutsideTheTableIsAnError) {
  RotaryInputs in = model_inputs(RotaryCase());
  const PositionCheck check;
  EXPECT_TRUE(posenc::position_check());
  for (const int64_t outside : positions_outside(64)) {
    in.positions = positions({0, 1, outside, 3, 4});
    const std::vector<std::string> parts{"positions", "64", std::to_string(outside) + " at index [2]"};
    expect_error([&] { rotate(in, in.q); }, parts);
    expect_error([&] { rotate_qk(in); }, parts);
  }
}

TEST_P(RotaryEmbedding, CheckedPositionOfAnyAxisOutsideTheTableIsAnError) {
  RotaryInputs in = model_inputs(RotaryCase());
  in.pair_axes = {0, 0, 0, 0, 1, 1, 1, 1};
  in.positions = positions({0, 1, 2, 3, 4, 0, 1, 2, 64, 4}).view({2, 5});
  const PositionCheck check;
  expect_error([&] { rotate(in, in.q); }, {"positions", "[0, 64)", "0 to 64, 64 at index [1, 3]"});
}

TEST_P(RotaryEmbedding, CheckedPositionsInsideTheTablePass) {
  RotaryInputs in = model_inputs(RotaryCase());
  in.positions = positions({63, 0, 5, 3, 4});
  const at::Tensor expected = rotate(in, in.q);
  const PositionCheck check;
  expect_same_bits(rotate(in, in.q), expected);
}

TEST_P(RotaryEmbedding, CheckedTablesOfFullWidthForAPartOfTheHeadAreAnError) {
  for (const int64_t rotary_dim : {4, 8}) {
    RotaryCase c;
    c.rotary_dim = rotary_dim;
    RotaryInputs in = model_inputs(c);
    in.cos = at::cat({in.cos, in.cos}, -1);
    in.sin = at::cat({in.sin, in.sin}, -1);
    EXPECT_NO_THROW(rotate(in, in.q));  // the shapes are valid
    const PositionCheck check;
    const std::string half = std::to_string(rotary_dim / 2);
    const std::vector<std::string> parts{
        "two equal halves of " + half + " columns", std::to_string(2 * rotary_dim) + " of 16 channels",
        "cos.narrow(-1, 0, " + half + ")"};
    expect_error([&] { rotate(in, in.q); }, parts);
    expect_error([&] { rotate_qk(in); }, parts);
  }
}

TEST_P(RotaryEmbedding, CheckedTablesOfOneColumnForEachPairPass) {
  RotaryCase c;
  c.rotary_dim = 8;
  RotaryInputs in = model_inputs(c);
  const at::Tensor expected = rotate(in, in.q);
  const PositionCheck check;
  expect_same_bits(rotate(in, in.q), expected);
  in.cos = at::ones_like(in.cos);  // no rotation
  in.sin = at::zeros_like(in.sin);
  expect_same_bits(rotate(in, in.q), in.q);
  in.sin = at::ones_like(in.sin);  // a grid with the same frequencies on both axes
  in.positions = positions({0, 1, 2, 3, 4, 0, 1, 2, 3, 4}).view({2, 5});
  in.pair_axes = {0, 0, 1, 1};
  EXPECT_NO_THROW(rotate(in, in.q));
}

TEST(RotaryEmbeddingPositionCheck, IsOffByDefault) {
  EXPECT_EQ(posenc::position_check(), env_int("POSENC_CHECK_POSITIONS", 0) != 0);
}

}  // namespace
}  // namespace posenc::test
