#include "positions_support.h"

#include <posenc/positions.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <vector>

// M-RoPE positions against a walk over the pieces of a sequence.
namespace posenc::test {
namespace {

using posenc::MropeOptions;

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

}  // namespace
}  // namespace posenc::test
