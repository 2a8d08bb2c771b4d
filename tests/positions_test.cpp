#include "support.h"

#if POSENC_CUDA
#include "cuda_support.h"
#endif

#include <posenc/frequencies.h>
#include <posenc/positions.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

namespace posenc::test {
namespace {

using posenc::MropeOptions;
using Ids = std::vector<int64_t>;

/// The parameter is the device and the dtype of positions.
class Positions : public TargetTest {
 protected:
  at::Tensor tensor(const Ids& values) const { return at::tensor(values, at::kLong).to(dtype()).to(device()); }

  /// `rows` as a tensor `[rows.size(), length]`.
  at::Tensor matrix(const std::vector<Ids>& rows) const {
    std::vector<at::Tensor> tensors;
    tensors.reserve(rows.size());
    for (const Ids& row : rows) {
      tensors.push_back(tensor(row));
    }
    return at::stack(tensors);
  }

  void expect_ids(const at::Tensor& actual, const at::Tensor& expected) const {
    EXPECT_EQ(actual.device().type(), device().type());
    expect_same_bits(actual, expected);
  }
};

std::vector<Target> position_targets(at::DeviceType device) {
  return {{device, at::kInt}, {device, at::kLong}};
}

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
// M-RoPE

constexpr int64_t kText = 11;
constexpr int64_t kImage = 151655;
constexpr int64_t kVideo = 151656;

/// Part of a sequence: `length` tokens of text or padding, or an image or video with a grid of patches before merging.
struct Piece {
  enum class Kind { text, image, video, padding } kind;
  int64_t length;
  int64_t frames = 0, rows = 0, columns = 0;
  float seconds = 1;
  int64_t padding_id = kText;
};

Piece text(int64_t length) {
  return {Piece::Kind::text, length};
}
Piece padding(int64_t length, int64_t id = kText) {
  return {Piece::Kind::padding, length, 0, 0, 0, 1, id};
}
/// Blocks of 2 x 2 patches are merged into one token.
Piece vision(Piece::Kind kind, int64_t frames, int64_t rows, int64_t columns, float seconds = 1) {
  return {kind, frames * (rows / 2) * (columns / 2), frames, rows, columns, seconds};
}
Piece image(int64_t rows, int64_t columns) {
  return vision(Piece::Kind::image, 1, rows, columns);
}
Piece video(int64_t frames, int64_t rows, int64_t columns, float seconds = 1) {
  return vision(Piece::Kind::video, frames, rows, columns, seconds);
}

/// Token ids, attention mask and positions of a sequence by a loop over its pieces. `next` is the following position.
struct Sequence {
  Ids ids, mask;
  std::array<Ids, 3> positions;
  int64_t next = 0;

  void add(int64_t id, int64_t t, int64_t h, int64_t w) {
    ids.push_back(id);
    mask.push_back(1);
    positions[0].push_back(t);
    positions[1].push_back(h);
    positions[2].push_back(w);
  }
};

Sequence walk(const std::vector<Piece>& pieces, double tokens_per_second = 0) {
  Sequence sequence;
  for (const Piece& piece : pieces) {
    const int64_t start = sequence.next;
    if (piece.kind == Piece::Kind::padding) {
      for (int64_t i = 0; i < piece.length; ++i) {
        sequence.add(piece.padding_id, 0, 0, 0);
        sequence.mask.back() = 0;
      }
      continue;
    }
    if (piece.kind == Piece::Kind::text) {
      for (int64_t i = 0; i < piece.length; ++i) {
        sequence.add(kText, start + i, start + i, start + i);
      }
      sequence.next = start + piece.length;
      continue;
    }
    const bool scaled = piece.kind == Piece::Kind::video && tokens_per_second > 0;
    for (int64_t f = 0; f < piece.frames; ++f) {
      for (int64_t y = 0; y < piece.rows / 2; ++y) {
        for (int64_t x = 0; x < piece.columns / 2; ++x) {
          const auto t = scaled
              ? static_cast<int64_t>(static_cast<float>(f) * piece.seconds * static_cast<float>(tokens_per_second))
              : f;
          sequence.add(piece.kind == Piece::Kind::image ? kImage : kVideo, start + t, start + y, start + x);
          sequence.next = std::max({sequence.next, start + t + 1, start + y + 1, start + x + 1});
        }
      }
    }
  }
  return sequence;
}

class MropePositions : public Positions {
 protected:
  /// Expects mrope_positions for a batch of sequences of equal length to equal `walk`. `grids_of_videos` are the
  /// frames, rows and columns that are passed; empty: those of the pieces.
  void expect_positions(
      const std::vector<std::vector<Piece>>& batch,
      const MropeOptions& options,
      std::vector<Ids> grids_of_videos = {}) const {
    std::vector<Ids> ids;
    std::vector<Ids> masks;
    std::array<std::vector<Ids>, 3> positions;
    Ids deltas;
    std::vector<Ids> images;
    std::vector<Ids> videos;
    std::vector<float> seconds;
    for (const std::vector<Piece>& pieces : batch) {
      const Sequence sequence = walk(pieces, options.tokens_per_second());
      ids.push_back(sequence.ids);
      masks.push_back(sequence.mask);
      for (size_t axis = 0; axis < 3; ++axis) {
        positions[axis].push_back(sequence.positions[axis]);
      }
      deltas.push_back(sequence.next - static_cast<int64_t>(sequence.ids.size()));
      for (const Piece& piece : pieces) {
        if (piece.kind == Piece::Kind::image) {
          images.push_back({piece.frames, piece.rows, piece.columns});
        } else if (piece.kind == Piece::Kind::video) {
          videos.push_back({piece.frames, piece.rows, piece.columns});
          seconds.push_back(piece.seconds);
        }
      }
    }
    if (!grids_of_videos.empty()) {
      videos = std::move(grids_of_videos);
    }
    using Optional = std::optional<at::Tensor>;
    const auto [actual, actual_deltas] = posenc::mrope_positions(
        matrix(ids), options, images.empty() ? std::nullopt : Optional(matrix(images)),
        videos.empty() ? std::nullopt : Optional(matrix(videos)),
        options.tokens_per_second() > 0 ? Optional(at::tensor(seconds).to(device())) : std::nullopt,
        matrix(masks).to(at::kBool));
    expect_ids(actual, at::stack({matrix(positions[0]), matrix(positions[1]), matrix(positions[2])}));
    expect_ids(actual_deltas, tensor(deltas));
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, MropePositions, ::testing::ValuesIn(position_targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, MropePositions, ::testing::ValuesIn(position_targets(at::kCUDA)), target_name);

TEST_P(MropePositions, OfTheExampleOfTheModelAreAsPublished) {
  // The example in the published code of Qwen2-VL: a video of 3 x 2 x 2 merged patches and 5 text tokens.
  Ids ids(12, kVideo);
  ids.resize(17, kText);
  const auto [positions, deltas] =
      posenc::mrope_positions(matrix({ids}), MropeOptions(), std::nullopt, matrix({{3, 4, 4}}));
  expect_ids(
      positions.select(1, 0),
      matrix(
          {{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7},
           {0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 3, 4, 5, 6, 7},
           {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 3, 4, 5, 6, 7}}));
  expect_ids(deltas, tensor({8 - 17}));
}

TEST_P(MropePositions, OfTextAreThoseOfText) {
  expect_positions({{text(5)}, {text(5)}}, MropeOptions());
}

TEST_P(MropePositions, OfImagesAndVideosFollowTheWalk) {
  expect_positions(
      {{text(3), image(4, 6), text(2), video(3, 4, 4), text(4)},                    // 3 + 6 + 2 + 12 + 4
       {image(2, 2), image(6, 2), text(1), image(2, 8), video(7, 2, 2), text(11)},  // 1 + 3 + 1 + 4 + 7 + 11
       {text(27)}},
      MropeOptions());
}

TEST_P(MropePositions, ThatEndWithAnImageHaveADeltaBeyondIt) {
  expect_positions({{text(2), image(4, 10)}, {image(8, 2), text(8)}}, MropeOptions());
}

TEST_P(MropePositions, OfVideosFollowTheClock) {
  for (const double tokens_per_second : {2.0, 25.0}) {
    expect_positions(
        {{text(3), video(4, 4, 6, 0.5F), text(2), video(3, 2, 4, 1.0F / 3), text(3)},    // 3 + 24 + 2 + 6 + 3
         {video(2, 2, 2, 0.04F), text(1), image(4, 4), video(5, 4, 6, 2.3F), text(1)}},  // 2 + 1 + 4 + 30 + 1
        MropeOptions().tokens_per_second(tokens_per_second));
  }
}

TEST_P(MropePositions, OfSeparateFramesAreThoseOfImages) {
  // Two videos of 3 and 2 frames, as given by the grids, with text between the frames.
  expect_positions(
      {{text(2), video(1, 4, 6), text(3), video(1, 4, 6), text(1), video(1, 4, 6), text(2), image(2, 4),  // 28
        text(1)},
       {text(1), video(1, 2, 4), text(1), video(1, 2, 4), text(23)}},
      MropeOptions().separate_frames(true), {{3, 4, 6}, {2, 2, 4}});
}

TEST_P(MropePositions, LeavePaddingOut) {
  expect_positions(
      {{padding(3), text(2), image(4, 4), text(2)}, {text(1), image(4, 6), text(2), padding(2)}}, MropeOptions());
}

/// The attention mask alone defines padding, even for image and video token ids.
TEST_P(MropePositions, LeavePaddingWithTheTokensOfImagesOut) {
  expect_positions(
      {{padding(3, kImage), text(2), image(4, 4), text(2)}, {text(1), image(4, 6), text(2), padding(2, kVideo)}},
      MropeOptions());
}

TEST_P(MropePositions, OfOtherTokenIdsAndMergesFollowTheOptions) {
  const auto options = MropeOptions().image_token_id(-5).video_token_id(-6).spatial_merge_size(3);
  const auto [positions, deltas] =
      posenc::mrope_positions(matrix({{1, -5, -5, -6, 1}}), options, matrix({{1, 3, 6}}), matrix({{1, 3, 3}}));
  expect_ids(positions.select(1, 0), matrix({{0, 1, 1, 3, 4}, {0, 1, 1, 3, 4}, {0, 1, 2, 3, 4}}));
  expect_ids(deltas, tensor({0}));
}

TEST_P(MropePositions, WithoutGridsAreThoseOfText) {
  const at::Tensor none = at::empty({0, 3}, tensor({}).options());
  const auto [positions, deltas] =
      posenc::mrope_positions(matrix({{kText, kImage, kVideo}}), MropeOptions(), none, none);
  expect_ids(positions.select(1, 0), matrix({{0, 1, 2}, {0, 1, 2}, {0, 1, 2}}));
  expect_ids(deltas, tensor({0}));
}

TEST_P(MropePositions, OfNothingAreEmpty) {
  const auto [positions, deltas] = posenc::mrope_positions(
      at::empty({2, 0}, tensor({}).options()), MropeOptions(), matrix({{1, 4, 4}}), matrix({{1, 4, 4}}));
  EXPECT_EQ(positions.sizes(), at::IntArrayRef({3, 2, 0}));
  expect_ids(deltas, tensor({0, 0}));
}

TEST_P(MropePositions, OfTokensBeyondTheGridsAreNoError) {
  const auto [positions, deltas] =
      posenc::mrope_positions(matrix({{kImage, kImage, kImage, kText}}), MropeOptions(), matrix({{1, 0, 4}}));
  EXPECT_EQ(positions.sizes(), at::IntArrayRef({3, 1, 4}));
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
// Errors

class PositionErrors : public DeviceTest {
 protected:
  at::Tensor tensor(const Ids& values) const { return at::tensor(values, at::kLong).to(device()); }
  at::Tensor floats() const { return at::zeros({2}, device()); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, PositionErrors, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, PositionErrors, ::testing::Values(at::kCUDA), device_name);

TEST_P(PositionErrors, BeginBehindTheLastInt32) {
  constexpr int64_t kLast = std::numeric_limits<int32_t>::max();
  const at::Tensor positions = posenc::offset_positions(kLast - 4, 4, device(), at::kInt);
  EXPECT_EQ(positions[3].item<int64_t>(), kLast - 1);
  expect_error([&] { posenc::offset_positions(kLast - 3, 4, device(), at::kInt); }, {"2^31", "2147483648"});
}

TEST_P(PositionErrors, OfOffsetsNameWhatIsWrong) {
  const std::string op = "posenc::offset_positions";
  expect_error([&] { posenc::offset_positions(0, -1, device()); }, {op, "seq_len", "not negative", "-1"});
  expect_error([&] { posenc::offset_positions(0, 1, device(), at::kFloat); }, {op, "int32 or int64", "Float"});
  expect_error([&] { posenc::offset_positions(1 << 30, 1 << 30, device(), at::kInt); }, {op, "2^31", "2147483648"});
  expect_error([&] { posenc::offset_positions(-(int64_t{1} << 32), 1, device(), at::kInt); }, {op, "-2^31", "-429496"});
  expect_error([&] { posenc::offset_positions(INT64_MAX, 1, device()); }, {op, "2^63", "9223372036854775807"});
  expect_error([&] { posenc::offset_positions(at::Tensor(), 1); }, {op, "offsets", "undefined"});
  expect_error([&] { posenc::offset_positions(floats(), 1); }, {op, "offsets", "int32 or int64", "Float"});
  expect_error([&] { posenc::offset_positions(tensor({1}).view({1, 1}), 1); }, {op, "offsets", "[B]", "[1, 1]"});
  expect_error([&] { posenc::offset_positions(tensor({1}), -2); }, {op, "seq_len", "-2"});
}

TEST_P(PositionErrors, OfPackedSequencesNameWhatIsWrong) {
  const std::string op = "posenc::packed_positions";
  const at::Tensor good = tensor({0, 2, 3});
  expect_error([&] { posenc::packed_positions(at::Tensor(), 3); }, {op, "cu_seqlens", "undefined"});
  expect_error([&] { posenc::packed_positions(floats(), 3); }, {op, "cu_seqlens", "int32 or int64", "Float"});
  expect_error([&] { posenc::packed_positions(tensor({}), 3); }, {op, "cu_seqlens", "[N + 1]", "[0]"});
  expect_error([&] { posenc::packed_positions(good.view({1, 3}), 3); }, {op, "cu_seqlens", "[N + 1]", "[1, 3]"});
  expect_error([&] { posenc::packed_positions(good, -1); }, {op, "num_tokens", "-1"});
  expect_error([&] { posenc::packed_positions(good.to(at::kInt), int64_t{1} << 31); }, {op, "num_tokens", "2^31"});
  expect_error([&] { posenc::packed_positions(good, 3, tensor({1})); }, {op, "offsets", "[N] = [2]", "[1]"});
  expect_error([&] { posenc::packed_positions(good, 3, floats()); }, {op, "offsets", "int32 or int64", "Float"});
  expect_error([&] { posenc::packed_positions(good, 3, tensor({1, 2}).to(at::kInt)); }, {op, "offsets", "Long", "Int"});
}

TEST_P(PositionErrors, OfShardsNameWhatIsWrong) {
  std::string op = "posenc::context_parallel_positions";
  expect_error([&] { posenc::context_parallel_positions(8, 0, 0, device()); }, {op, "world_size", "positive", "0"});
  for (const int64_t rank : {-1, 2}) {
    expect_error(
        [&] { posenc::context_parallel_positions(8, rank, 2, device()); }, {op, "rank", "1", std::to_string(rank)});
  }
  for (const int64_t seq_len : {6, -4}) {
    expect_error(
        [&] { posenc::context_parallel_positions(seq_len, 0, 2, device()); },
        {op, "seq_len", "2 world_size = 4", std::to_string(seq_len)});
  }
  expect_error([&] { posenc::context_parallel_positions(8, 0, 2, device(), at::kHalf); }, {op, "int32 or int64"});

  op = "posenc::context_parallel_packed_positions";
  const at::Tensor good = tensor({0, 4, 8});
  expect_error([&] { posenc::context_parallel_packed_positions(floats(), 8, 0, 2); }, {op, "cu_seqlens", "Float"});
  expect_error([&] { posenc::context_parallel_packed_positions(good, 8, 2, 2); }, {op, "rank", "2"});
  expect_error(
      [&] { posenc::context_parallel_packed_positions(good, 10, 0, 2); }, {op, "num_tokens", "2 world_size = 4", "10"});
}

TEST_P(PositionErrors, OfMropeNameWhatIsWrong) {
  const std::string op = "posenc::mrope_positions";
  const at::Tensor ids = tensor({kText, kImage}).view({1, 2});
  const at::Tensor grid = tensor({1, 2, 2}).view({1, 3});
  const auto call = [](const at::Tensor& input_ids, const MropeOptions& options = MropeOptions(),
                       const std::optional<at::Tensor>& images = std::nullopt,
                       const std::optional<at::Tensor>& videos = std::nullopt,
                       const std::optional<at::Tensor>& seconds = std::nullopt,
                       const std::optional<at::Tensor>& mask = std::nullopt) {
    return [=] { posenc::mrope_positions(input_ids, options, images, videos, seconds, mask); };
  };
  const MropeOptions defaults;
  expect_error(call(at::Tensor()), {op, "input_ids", "undefined"});
  expect_error(call(ids.to(at::kFloat)), {op, "input_ids", "int32 or int64", "Float"});
  expect_error(call(ids.flatten()), {op, "input_ids", "[B, S]", "[2]"});
  expect_error(call(ids, MropeOptions().spatial_merge_size(0)), {op, "spatial_merge_size", "0"});
  expect_error(call(ids, MropeOptions().video_token_id(kImage)), {op, "video_token_id", "differ", "151655"});
  expect_error(call(ids, MropeOptions().tokens_per_second(-1)), {op, "tokens_per_second", "-1"});
  expect_error(call(ids, MropeOptions().tokens_per_second(2).separate_frames(true)), {op, "separate_frames", "2"});
  expect_error(call(ids, defaults, at::Tensor()), {op, "image_grid_thw", "undefined"});
  expect_error(call(ids, defaults, grid.flatten()), {op, "image_grid_thw", "[N, 3]", "[3]"});
  expect_error(call(ids, defaults, {}, grid.to(at::kDouble)), {op, "video_grid_thw", "int32 or int64", "Double"});
  expect_error(call(ids, defaults, {}, grid, at::ones({1}, device())), {op, "tokens_per_second", "seconds_per_grid"});
  const auto timed = MropeOptions().tokens_per_second(2);
  expect_error(call(ids, timed, grid, {}, at::ones({1}, device())), {op, "video_grid_thw", "seconds_per_grid"});
  expect_error(call(ids, timed, {}, grid, at::ones({2}, device())), {op, "seconds_per_grid", "[N] = [1]", "[2]"});
  expect_error(call(ids, timed, {}, grid, tensor({1})), {op, "seconds_per_grid", "floating", "Long"});
  expect_error(call(ids, defaults, {}, {}, {}, tensor({1, 1})), {op, "attention_mask", "[1, 2]", "[2]"});
  expect_error(call(ids, defaults, {}, {}, {}, ids.to(at::kFloat)), {op, "attention_mask", "bool", "Float"});
}

TEST_P(PositionErrors, OfGridsNameWhatIsWrong) {
  std::string op = "posenc::grid_positions";
  expect_error([&] { posenc::grid_positions(floats(), 3); }, {op, "grids", "int32 or int64", "Float"});
  expect_error([&] { posenc::grid_positions(tensor({1, 2}), 3); }, {op, "grids", "[N, 3] or [N, 2]", "[2]"});
  expect_error([&] { posenc::grid_positions(tensor({1, 2}).view({1, 2}), -3); }, {op, "num_tokens", "-3"});
  expect_error([&] { posenc::grid_positions(tensor({1, 2}).view({1, 2}), 3, 0); }, {op, "spatial_merge_size", "0"});
  op = "posenc::llama4_vision_positions";
  expect_error([&] { posenc::llama4_vision_positions(-1, 2, 1, device()); }, {op, "height", "-1"});
  expect_error([&] { posenc::llama4_vision_positions(1, -2, 1, device()); }, {op, "width", "-2"});
  expect_error([&] { posenc::llama4_vision_positions(1, 2, -3, device()); }, {op, "num_images", "-3"});
  expect_error([&] { posenc::llama4_vision_positions(1, 2, 1, device(), at::kFloat); }, {op, "int32 or int64"});
}

/// Arguments on different devices.
class PositionMixedDevices : public PositionErrors {};

INSTANTIATE_TEST_SUITE_P(Cuda, PositionMixedDevices, ::testing::Values(at::kCUDA), device_name);

TEST_P(PositionMixedDevices, AreAnError) {
  const at::Tensor ids = tensor({kText, kImage}).view({1, 2});
  const at::Tensor grid = tensor({1, 2, 2}).view({1, 3});
  expect_error([&] { posenc::packed_positions(tensor({0, 1}), 1, tensor({3}).cpu()); }, {"offsets", "cuda", "cpu"});
  expect_error([&] { posenc::mrope_positions(ids, MropeOptions(), grid.cpu()); }, {"image_grid_thw", "cuda", "cpu"});
  expect_error(
      [&] { posenc::mrope_positions(ids, MropeOptions(), {}, grid.cpu()); }, {"video_grid_thw", "cuda", "cpu"});
  expect_error(
      [&] { posenc::mrope_positions(ids, MropeOptions().tokens_per_second(2), {}, grid, at::ones({1})); },
      {"seconds_per_grid", "cuda", "cpu"});
  expect_error(
      [&] { posenc::mrope_positions(ids, MropeOptions(), {}, {}, {}, ids.cpu()); }, {"attention_mask", "cuda", "cpu"});
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
