#include "rotary_embedding_support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <limits>

// rotary_embedding with positions outside the tables, with position axes, and with the position check.
namespace posenc::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbedding, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbedding, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

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
