#include "rotary_embedding_support.h"

#include <ATen/ATen.h>

// rotary_embedding over a grid of shapes, strides and flags, against the reference in float64.
namespace posenc::test {
namespace {

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

class RotaryEmbeddingGrid : public ::testing::TestWithParam<RotaryGridParam> {
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

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    RotaryEmbeddingGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCPU)), ::testing::ValuesIn(grid()), ::testing::Bool()),
    rotary_grid_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    RotaryEmbeddingGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCUDA)), ::testing::ValuesIn(grid()), ::testing::Bool()),
    rotary_grid_name);

}  // namespace
}  // namespace posenc::test
