#include "qk_norm_support.h"
#include "rotary_embedding_support.h"

#include <ATen/ATen.h>

#include <tuple>

// qk_norm_rotary_embedding over a grid of calls, against scalar loops.
namespace posenc::test {
namespace {

std::vector<RotaryCase> grid() {
  std::vector<RotaryCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.name = name;
    change(c);
    cases.push_back(c);
  };
  const auto add_size = [&add](int64_t head_dim, int64_t rotary_dim) {
    add("HeadDim" + std::to_string(head_dim) + "Rotary" + std::to_string(rotary_dim), [=](RotaryCase& c) {
      c.head_dim = head_dim;
      c.rotary_dim = rotary_dim;
    });
  };
  add("Default", [](RotaryCase&) {});
  // Less than, exactly and more than one chunk, which is two 16-byte vectors: 16 channels of 2 bytes, 8 of 4 or 4 of 8.
  for (const int64_t head_dim : {2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15, 17, 18, 24, 32, 34}) {
    add_size(head_dim, head_dim / 2 * 2);
  }
  // Numbers of chunks that are and are not a power of two; heads with several chunks per lane.
  for (const int64_t head_dim : {48, 64, 80, 96, 112, 128, 192, 256, 512, 1024}) {
    add_size(head_dim, head_dim);
  }
  // Channels beyond rotary_dim that are one, two or an odd number of vectors, or no whole number of vectors.
  for (const auto& [head_dim, rotary_dim] : std::vector<std::pair<int64_t, int64_t>>{
           {128, 64}, {256, 64}, {24, 16}, {40, 16}, {72, 32}, {20, 16}, {33, 16}, {513, 256}}) {
    add_size(head_dim, rotary_dim);
  }
  add("ManyHeads", [](RotaryCase& c) {
    c.tokens = 37;
    c.q_heads = 13;
    c.k_heads = 5;
    c.head_dim = c.rotary_dim = 64;
  });
  add("OneHead", [](RotaryCase& c) { c.q_heads = c.k_heads = c.tokens = c.batch = 1; });
  add("NoKeys", [](RotaryCase& c) { c.k_heads = 0; });
  add("Conjugate", [](RotaryCase& c) { c.conjugate = true; });
  add("Packed", [](RotaryCase& c) { c.packed = true; });
  add("PositionsPerToken", [](RotaryCase& c) {
    c.positions = PositionShape::per_token;
    c.position_dtype = at::kInt;
  });
  add("PositionsPerBatch", [](RotaryCase& c) { c.positions = PositionShape::per_batch; });
  add("TablesPerToken", [](RotaryCase& c) { c.tables = TableShape::per_token; });
  add("TablesPerTokenShared", [](RotaryCase& c) { c.tables = TableShape::per_token_shared; });
  for (int i = 1; i < kTableStrides; ++i) {
    add("TableStrides" + std::to_string(i), [i](RotaryCase& c) { c.table_strides = static_cast<TableStrides>(i); });
  }
  for (int i = 1; i < kStrides; ++i) {
    add(std::string("Strides_") + strides_name(static_cast<Strides>(i)), [i](RotaryCase& c) {
      c.head_dim = c.rotary_dim = 32;
      c.q_strides = c.k_strides = static_cast<Strides>(i);
    });
  }
  for (const auto& [name, axes, pattern] : std::vector<std::tuple<std::string, int64_t, PairAxes>>{
           {"Chunked", 3, PairAxes::chunked}, {"Cycled", 3, PairAxes::cycled}, {"Random", 4, PairAxes::random}}) {
    const auto add_axes = [&, n = name, a = axes, p = pattern](
                              const std::string& suffix, const std::function<void(RotaryCase&)>& more) {
      add(c10::str("Axes", n, suffix), [=](RotaryCase& c) {
        c.axes = a;
        c.pair_axes = p;
        c.positions = PositionShape::per_batch;
        more(c);
      });
    };
    add_axes("", [](RotaryCase&) {});
    add_axes("Odd", [](RotaryCase& c) { c.head_dim = 21, c.rotary_dim = 18; });
    add_axes("Large", [](RotaryCase& c) { c.head_dim = c.rotary_dim = 128; });
    add_axes("LargePartial", [](RotaryCase& c) { c.head_dim = 128, c.rotary_dim = 64; });
    add_axes("LargePacked", [](RotaryCase& c) {
      c.head_dim = c.rotary_dim = 128;
      c.packed = true;
      c.positions = PositionShape::per_token;
      c.position_dtype = at::kInt;
    });
    add_axes("LargeOneValue", [](RotaryCase& c) {
      c.head_dim = c.rotary_dim = 128;
      c.q_strides = c.k_strides = Strides::one_value;
    });
    add_axes("LargeTransposedTables", [](RotaryCase& c) {
      c.head_dim = c.rotary_dim = 128;
      c.table_strides = TableStrides::transposed;
    });
  }
  add("DifferentStrides", [](RotaryCase& c) {
    c.q_strides = Strides::head_major;
    c.k_strides = Strides::every_other;
  });
  return cases;
}

class QKNormRotaryEmbeddingGrid : public ::testing::TestWithParam<RotaryGridParam> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam()).device); }
};

TEST_P(QKNormRotaryEmbeddingGrid, ResultsAndGradientsMatchTheScalarLoops) {
  auto [target, c, interleaved] = GetParam();
  c.interleaved = interleaved;
  for (const bool unit_offset : {false, true}) {
    // The two pairings together cover all four combinations of unit_offset and wide weights for each dtype.
    const bool wide = unit_offset != interleaved;
    const QKNormInputs in = make_qk_norm_inputs(c, target, unit_offset, wide);
    SCOPED_TRACE(
        ::testing::Message() << target << ", " << c << (unit_offset ? ", unit offset" : "")
                             << (wide ? ", wide weights" : ""));
    expect_qk_norm_results(
        in, random_tensor(in.rotary.q.sizes(), target, c.q_strides),
        random_tensor(in.rotary.k.sizes(), target, c.k_strides));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    QKNormRotaryEmbeddingGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCPU)), ::testing::ValuesIn(grid()), ::testing::Bool()),
    rotary_grid_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    QKNormRotaryEmbeddingGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCUDA)), ::testing::ValuesIn(grid()), ::testing::Bool()),
    rotary_grid_name);

}  // namespace
}  // namespace posenc::test
