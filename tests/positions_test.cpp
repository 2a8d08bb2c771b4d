#include "positions_support.h"

#if POSENC_CUDA
#include "cuda_support.h"
#endif

#include <posenc/frequencies.h>
#include <posenc/positions.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

namespace posenc::test {
namespace {

using posenc::MropeOptions;

INSTANTIATE_TEST_SUITE_P(Cpu, Positions, ::testing::ValuesIn(position_targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, Positions, ::testing::ValuesIn(position_targets(at::kCUDA)), target_name);

// ---------------------------------------------------------------------------------------------------------------------
// Offsets

TEST_P(Positions, OfACacheStartAtItsLength) {
  expect_ids(posenc::offset_positions(7, 4, device(), dtype()), tensor({7, 8, 9, 10}));
  expect_ids(posenc::offset_positions(-1, 2, device(), dtype()), tensor({-1, 0}));
  constexpr int64_t kLowest = std::numeric_limits<int32_t>::min();
  expect_ids(posenc::offset_positions(kLowest, 2, device(), dtype()), tensor({kLowest, kLowest + 1}));
  EXPECT_EQ(posenc::offset_positions(7, 0, device(), dtype()).sizes(), at::IntArrayRef({0}));
}

TEST_P(Positions, OfSeveralCachesStartAtTheLengthOfEach) {
  expect_ids(posenc::offset_positions(tensor({3, 0, 90}), 2), matrix({{3, 4}, {0, 1}, {90, 91}}));
  expect_ids(posenc::offset_positions(tensor({3, 0, 7, 90}).slice(0, 0, {}, 3), 1), matrix({{3}, {90}}));
  EXPECT_EQ(posenc::offset_positions(tensor({3, 4}), 0).sizes(), at::IntArrayRef({2, 0}));
  EXPECT_EQ(posenc::offset_positions(tensor({}), 3).sizes(), at::IntArrayRef({0, 3}));
}

// ---------------------------------------------------------------------------------------------------------------------
// Packed sequences

/// cu_seqlens of sequences of these lengths.
Ids boundaries_of(const Ids& lengths) {
  Ids boundaries(lengths.size() + 1);
  std::partial_sum(lengths.begin(), lengths.end(), boundaries.begin() + 1);
  return boundaries;
}

/// Positions of packed sequences by a loop over tokens: from `offsets[n]` in sequence n, from 0 after the last one.
Ids scalar_packed_positions(const Ids& lengths, const Ids& offsets, int64_t num_tokens) {
  Ids positions;
  for (size_t n = 0; n < lengths.size(); ++n) {
    for (int64_t i = 0; i < lengths[n]; ++i) {
      positions.push_back(offsets[n] + i);
    }
  }
  for (int64_t i = 0; static_cast<int64_t>(positions.size()) < num_tokens; ++i) {
    positions.push_back(i);
  }
  positions.resize(num_tokens);
  return positions;
}

TEST_P(Positions, OfPackedSequencesCountFromZeroInEach) {
  const std::vector<Ids> all_lengths = {{3, 2}, {5}, {}, {0}, {0, 0, 4, 0, 1, 0}, {1, 1, 1}, {100, 0, 257, 31}};
  for (const Ids& lengths : all_lengths) {
    const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    for (const int64_t behind : {0, 1, 3}) {
      SCOPED_TRACE(::testing::Message() << ::testing::PrintToString(lengths) << " and " << behind << " more");
      const Ids expected = scalar_packed_positions(lengths, Ids(lengths.size(), 0), total + behind);
      expect_ids(posenc::packed_positions(tensor(boundaries_of(lengths)), total + behind), tensor(expected));
    }
  }
}

TEST_P(Positions, OfPackedSequencesCountFromTheirOffsets) {
  const Ids lengths = {3, 0, 2, 4};
  const Ids offsets = {10, 20, 0, 7};
  for (const int64_t num_tokens : {9, 11}) {
    const Ids expected = scalar_packed_positions(lengths, offsets, num_tokens);
    expect_ids(posenc::packed_positions(tensor(boundaries_of(lengths)), num_tokens, tensor(offsets)), tensor(expected));
  }
}

TEST_P(Positions, OfFewerTokensThanTheBoundariesHoldAreTheFirstOnes) {
  expect_ids(posenc::packed_positions(tensor({0, 3, 6}), 4), tensor({0, 1, 2, 0}));
}

TEST_P(Positions, BoundariesMayBeAnyViewOfATensor) {
  const at::Tensor wide = matrix({{0, 9}, {3, 9}, {5, 9}});
  expect_ids(posenc::packed_positions(wide.select(1, 0), 5), tensor({0, 1, 2, 0, 1}));
}

// ---------------------------------------------------------------------------------------------------------------------
// Context parallelism

/// Indices in the whole tensor and positions of the tokens of `rank`: of each sequence in `lengths`, chunks `rank` and
/// `2 world_size - 1 - rank`.
std::pair<Ids, Ids> scalar_shard(const Ids& lengths, int64_t rank, int64_t world_size) {
  Ids indices;
  Ids positions;
  int64_t start = 0;
  for (const int64_t length : lengths) {
    const int64_t chunk = length / (2 * world_size);
    for (int64_t p = 0; p < length; ++p) {
      if (p / chunk == rank || p / chunk == 2 * world_size - 1 - rank) {
        indices.push_back(start + p);
        positions.push_back(p);
      }
    }
    start += length;
  }
  return {indices, positions};
}

TEST_P(Positions, OfAShardAreTwoChunksOfTheSequence) {
  for (const int64_t world_size : {1, 2, 3, 8}) {
    for (int64_t rank = 0; rank < world_size; ++rank) {
      for (const int64_t chunk : {0, 1, 5}) {
        const int64_t seq_len = 2 * world_size * chunk;
        const auto [indices, positions] = scalar_shard({seq_len}, rank, world_size);
        expect_ids(posenc::context_parallel_positions(seq_len, rank, world_size, device(), dtype()), tensor(positions));
      }
    }
  }
}

TEST_P(Positions, OfAPackedShardAreTwoChunksOfEachSequence) {
  for (const int64_t world_size : {1, 2, 3}) {
    const int64_t unit = 2 * world_size;
    const std::vector<Ids> all_lengths = {{4 * unit, unit, 3 * unit}, {0, 2 * unit, 0, 0, unit, 0}, {unit}, {0}, {}};
    for (const Ids& lengths : all_lengths) {
      for (const int64_t behind : {int64_t{0}, 2 * unit}) {
        Ids all = lengths;
        all.push_back(behind);
        const int64_t total = std::accumulate(all.begin(), all.end(), int64_t{0});
        for (int64_t rank = 0; rank < world_size; ++rank) {
          SCOPED_TRACE(::testing::Message() << ::testing::PrintToString(all) << ", rank " << rank);
          const auto [expected_indices, expected_positions] = scalar_shard(all, rank, world_size);
          const auto [positions, indices] =
              posenc::context_parallel_packed_positions(tensor(boundaries_of(lengths)), total, rank, world_size);
          expect_ids(positions, tensor(expected_positions));
          expect_ids(indices, tensor(expected_indices));
        }
      }
    }
  }
}

/// Rotates the shard of each rank by its positions and copies the results into a tensor like `x`.
at::Tensor rotate_in_shards(
    const at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    int64_t world_size,
    const std::function<std::pair<at::Tensor, at::Tensor>(int64_t rank)>& positions_and_indices) {
  at::Tensor whole = at::full_like(x, std::nan(""));
  for (int64_t rank = 0; rank < world_size; ++rank) {
    const auto [positions, indices] = positions_and_indices(rank);
    const at::Tensor shard = x.index_select(-3, indices);
    whole.index_copy_(-3, indices.to(at::kLong), posenc::rotary_embedding(shard, cos, sin, positions));
  }
  return whole;
}

TEST_P(Positions, ShardsOfASequenceRotateAsTheWhole) {
  constexpr int64_t world_size = 4;
  constexpr int64_t seq_len = 48;
  const at::Tensor x = random_tensor({2, seq_len, 3, 16}, {device().type(), at::kBFloat16});
  const auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(16).to(device()), seq_len);
  const at::Tensor joined = rotate_in_shards(x, cos, sin, world_size, [&](int64_t rank) {
    const at::Tensor positions = posenc::context_parallel_positions(seq_len, rank, world_size, device(), dtype());
    return std::pair(positions, positions);
  });
  expect_same_bits(joined, posenc::rotary_embedding(x, cos, sin));
}

TEST_P(Positions, ShardsOfPackedSequencesRotateAsTheWhole) {
  constexpr int64_t world_size = 4;
  const Ids lengths = {24, 0, 8, 40};
  const at::Tensor cu_seqlens = tensor(boundaries_of(lengths));
  const at::Tensor x = random_tensor({72, 3, 16}, {device().type(), at::kBFloat16});
  const auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(16).to(device()), 40);
  const at::Tensor joined = rotate_in_shards(x, cos, sin, world_size, [&](int64_t rank) {
    const auto [positions, indices] =
        posenc::context_parallel_packed_positions(cu_seqlens, x.size(0), rank, world_size);
    return std::pair(positions, indices);
  });
  expect_same_bits(joined, posenc::rotary_embedding(x, cos, sin, posenc::packed_positions(cu_seqlens, x.size(0))));
}

// ---------------------------------------------------------------------------------------------------------------------
// Grids

/// Rows and columns of patches by loops over windows of `side` x `side`.
std::vector<Ids> scalar_grid_positions(const std::vector<Ids>& grids, int64_t side) {
  Ids rows;
  Ids columns;
  for (const Ids& grid : grids) {
    for (int64_t f = 0; f < (grid.size() == 3 ? grid[0] : 1); ++f) {
      for (int64_t top = 0; top < grid[grid.size() - 2]; top += side) {
        for (int64_t left = 0; left < grid.back(); left += side) {
          for (int64_t y = 0; y < side; ++y) {
            for (int64_t x = 0; x < side; ++x) {
              rows.push_back(top + y);
              columns.push_back(left + x);
            }
          }
        }
      }
    }
  }
  return {rows, columns};
}

TEST_P(Positions, OfPatchesInWindowsFollowTheLoop) {
  const std::vector<Ids> grids = {{1, 4, 6}, {0, 2, 2}, {3, 2, 4}, {1, 0, 6}, {2, 8, 2}};
  for (const int64_t side : {1, 2}) {
    const std::vector<Ids> expected = scalar_grid_positions(grids, side);
    const auto num_tokens = static_cast<int64_t>(expected[0].size());
    expect_ids(posenc::grid_positions(matrix(grids), num_tokens, side), matrix(expected));
  }
  const std::vector<Ids> thirds = {{1, 3, 9}, {1, 6, 3}};
  expect_ids(posenc::grid_positions(matrix(thirds), 45, 3), matrix(scalar_grid_positions(thirds, 3)));
}

TEST_P(Positions, OfPatchesInRowsFollowTheLoop) {
  const std::vector<Ids> sizes = {{3, 5}, {1, 1}, {7, 2}};
  expect_ids(posenc::grid_positions(matrix(sizes), 30), matrix(scalar_grid_positions(sizes, 1)));
}

TEST_P(Positions, OfPatchesBehindTheLastGridAreZero) {
  expect_ids(posenc::grid_positions(matrix({{1, 3}}), 5), matrix({{0, 0, 0, 0, 0}, {0, 1, 2, 0, 0}}));
  expect_ids(posenc::grid_positions(matrix({{1, 0, 4}}), 2, 2), matrix({{0, 0}, {0, 0}}));
  expect_ids(posenc::grid_positions(at::empty({0, 3}, tensor({}).options()), 2, 2), matrix({{0, 0}, {0, 0}}));
  EXPECT_EQ(posenc::grid_positions(matrix({{1, 3}}), 0).sizes(), at::IntArrayRef({2, 0}));
}

TEST_P(Positions, OfLlama4StartAtOneAndLeaveTheClassTokenAlone) {
  for (const int64_t num_images : {0, 1, 3}) {
    Ids columns;
    Ids rows;
    for (int64_t n = 0; n < num_images; ++n) {
      for (int64_t y = 0; y < 2; ++y) {
        for (int64_t x = 0; x < 3; ++x) {
          columns.push_back(x + 1);
          rows.push_back(y + 1);
        }
      }
      columns.push_back(0);
      rows.push_back(0);
    }
    expect_ids(posenc::llama4_vision_positions(2, 3, num_images, device(), dtype()), matrix({columns, rows}));
  }
  expect_ids(posenc::llama4_vision_positions(0, 3, 1, device(), dtype()), matrix({{0}, {0}}));
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA graphs

#if POSENC_CUDA

class PositionsCudaGraph : public ::testing::Test {
 protected:
  void SetUp() override {
    require_device(at::kCUDA);
    require_caching_allocator();
  }
};

/// A capture fails if the host waits. A replay reads the values that the tensors have at that time.
TEST_F(PositionsCudaGraph, EveryFunctionIsCapturedAndReplayed) {
  const auto tensor = [](const Ids& values) { return at::tensor(values, at::kLong).to(at::kCUDA); };
  const at::Tensor lengths = tensor({5, 9});
  const at::Tensor cu_seqlens = tensor({0, 4, 12});
  const at::Tensor ids = tensor({kText, kImage, kImage, kText, kVideo, kText}).view({1, 6});
  const at::Tensor grid = tensor({1, 2, 4}).view({1, 3});
  const at::Tensor video_grid = tensor({1, 2, 2}).view({1, 3});
  const at::Tensor seconds = at::ones({1}, at::kCUDA);
  const at::Tensor mask = at::ones({1, 6}, at::kCUDA).to(at::kLong);
  std::vector<at::Tensor> found;
  const auto action = [&] {
    found.clear();
    found.push_back(posenc::offset_positions(3, 4, at::kCUDA));
    found.push_back(posenc::offset_positions(lengths, 3));
    found.push_back(posenc::packed_positions(cu_seqlens, 16, lengths));
    found.push_back(posenc::context_parallel_positions(16, 1, 2, at::kCUDA));
    const auto [positions, indices] = posenc::context_parallel_packed_positions(cu_seqlens, 16, 1, 2);
    const auto [multi, deltas] =
        posenc::mrope_positions(ids, MropeOptions().tokens_per_second(2), grid, video_grid, seconds, mask);
    found.insert(found.end(), {positions, indices, multi, deltas});
    found.push_back(posenc::grid_positions(grid, 9, 2));
    found.push_back(posenc::llama4_vision_positions(2, 2, 2, at::kCUDA));
  };
  at::cuda::CUDAGraph graph;
  capture(graph, action);
  const std::vector<at::Tensor> captured = found;
  lengths.copy_(tensor({50, 0}));
  cu_seqlens.copy_(tensor({0, 8, 12}));
  ids.copy_(tensor({kImage, kImage, kText, kText, kText, kVideo}).view({1, 6}));
  grid.copy_(tensor({1, 4, 2}).view({1, 3}));
  mask.select(1, 3).zero_();
  graph.replay();
  c10::cuda::device_synchronize();
  action();
  for (size_t i = 0; i < found.size(); ++i) {
    SCOPED_TRACE(i);
    expect_same_bits(captured[i], found[i]);
  }
}

#endif

}  // namespace
}  // namespace posenc::test
