#include "support.h"

#include <posenc/pair_axes.h>

namespace posenc::test {
namespace {

using Axes = std::vector<int64_t>;

TEST(MropePairAxes, OfQwen2VlAreChunks) {
  Axes expected(16, 0);
  expected.insert(expected.end(), 24, 1);
  expected.insert(expected.end(), 24, 2);
  EXPECT_EQ(posenc::mrope_pair_axes({16, 24, 24}), expected);
}

// The slices `[1:60:3]` and `[2:60:3]` of Qwen3-VL in transformers, written out.
TEST(MropePairAxes, OfQwen3VlAreInterleaved) {
  Axes expected(64, 0);
  for (const int64_t pair : {1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 37, 40, 43, 46, 49, 52, 55, 58}) {
    expected[pair] = 1;
  }
  for (const int64_t pair : {2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, 44, 47, 50, 53, 56, 59}) {
    expected[pair] = 2;
  }
  EXPECT_EQ(posenc::mrope_pair_axes({24, 20, 20}, /*interleaved=*/true), expected);
}

TEST(MropePairAxes, OfAnyNumberOfSections) {
  EXPECT_EQ(posenc::mrope_pair_axes({2}), (Axes{0, 0}));
  EXPECT_EQ(posenc::mrope_pair_axes({1, 2}), (Axes{0, 1, 1}));
  EXPECT_EQ(posenc::mrope_pair_axes({1, 1, 1, 2}), (Axes{0, 1, 2, 3, 3}));
}

TEST(MropePairAxes, UnevenInterleavedSectionsLeaveTheRestToTheFirstAxis) {
  EXPECT_EQ(posenc::mrope_pair_axes({4, 2, 1}, true), (Axes{0, 1, 2, 0, 1, 0, 0}));
}

TEST(MropePairAxes, BadSectionsAreErrors) {
  const auto expect_rejected = [](const Axes& sections, bool interleaved, std::vector<std::string> parts) {
    parts.emplace_back("posenc::mrope_pair_axes: ");
    expect_error([&] { posenc::mrope_pair_axes(sections, interleaved); }, parts);
  };
  expect_rejected({}, false, {"one to four sections", "got []"});
  expect_rejected({1, 1, 1, 1, 1}, false, {"one to four sections", "got [1, 1, 1, 1, 1]"});
  expect_rejected({4, 0, 4}, false, {"sections of 1 to", "got [4, 0, 4]"});
  expect_rejected({4, -1, 4}, false, {"sections of 1 to", "got [4, -1, 4]"});
  expect_rejected({1LL << 40, 1, 1}, false, {"sections of 1 to"});
  expect_rejected({4, 4}, true, {"three sections", "got [4, 4]"});
  // Six interleaved pairs are two for each axis.
  expect_rejected({1, 4, 1}, true, {"sections that interleave", "[1, 4, 1]", "axis 1 would have 2"});
  expect_rejected({1, 1, 4}, true, {"sections that interleave", "[1, 1, 4]", "axis 2 would have 2"});
}

TEST(GridPairAxes, HalvesOrAlternates) {
  EXPECT_EQ(posenc::grid_pair_axes(6), (Axes{0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(posenc::grid_pair_axes(6, /*alternating=*/true), (Axes{0, 1, 0, 1, 0, 1}));
}

TEST(GridPairAxes, OddOrNoPairsAreErrors) {
  for (const int64_t pairs : {-2, 0, 3}) {
    expect_error(
        [&] { posenc::grid_pair_axes(pairs); },
        {"posenc::grid_pair_axes: ", "positive, even num_pairs", "got " + std::to_string(pairs)});
  }
}

}  // namespace
}  // namespace posenc::test
