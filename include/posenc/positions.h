#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <tuple>

/// Positions of tokens as integer tensors, for the argument `positions` of the rotary operators: caches, packed
/// sequences, context parallelism, images and video.
///
/// Results are on the device of the tensors they are made of. Nothing waits for the device, and CUDA graphs capture
/// every function: what fixes a size (the number of tokens, of ranks) is an argument of the host, and what lies in a
/// tensor is neither read nor checked there. Where such a tensor breaks its own rules (boundaries that fall, more
/// image tokens than grids) the positions it makes are undefined; memory out of bounds is never read.
///
/// Positions have the dtype of the tensors they are made of, int32 or int64, and int64 where there are none.
namespace posenc {

/// Positions `offset` to `offset + seq_len - 1`: tokens behind a cache that holds `offset` of them already.
///
/// @param offset  may be negative; the operators give NaN for a position below zero.
/// @param seq_len  S, not negative.
/// @param dtype  int32 or int64.
/// @return `[S]` on `device`.
///
/// Example:
/// ```
/// auto [q_out, k_out] = posenc::rotary_embedding_qk(q, k, cos, sin, posenc::offset_positions(cached, 1, q.device()));
/// ```
POSENC_API at::Tensor offset_positions(
    int64_t offset,
    int64_t seq_len,
    c10::Device device = at::kCPU,
    at::ScalarType dtype = at::kLong);

/// The same where every sequence has an offset of its own, as in a batch that is decoded together.
///
/// @param offsets  `[B]`, int32 or int64.
/// @return `[B, S]`.
POSENC_API at::Tensor offset_positions(const at::Tensor& offsets, int64_t seq_len);

/// Positions of packed sequences: every sequence counts from 0, or from its offset.
///
/// @param cu_seqlens  `[N + 1]`, int32 or int64: boundaries, from 0 and never falling, as attention kernels for
///   packed sequences take them. Sequences may be empty. Tokens behind the last boundary (padding, as a rule) count as
///   one more sequence, from 0.
/// @param num_tokens  T, not negative.
/// @param offsets  `[N]`, of the dtype and device of `cu_seqlens`: the position of the first token of each sequence.
/// @return `[T]`.
///
/// Example:
/// ```
/// // cu_seqlens = {0, 3, 5}, num_tokens = 6: positions {0, 1, 2, 0, 1, 0}
/// auto positions = posenc::packed_positions(cu_seqlens, q.size(0));
/// ```
POSENC_API at::Tensor packed_positions(
    const at::Tensor& cu_seqlens,
    int64_t num_tokens,
    const std::optional<at::Tensor>& offsets = std::nullopt);

/// Positions of the tokens that one rank holds of a sequence divided for context parallelism with balanced load: the
/// sequence is cut into 2 C chunks of equal length, and rank r of C holds chunks r and 2 C - 1 - r, in this order, so
/// that every rank has as much of a causal mask (Llama 3, Grattafiori et al. 2024, section 3.3.2). As the sequence
/// starts at 0, they are the indices of these tokens in the whole sequence too.
///
/// @param seq_len  S of the whole sequence, a multiple of 2 C.
/// @param rank,world_size  r and C, `0 <= r < C`.
/// @param dtype  int32 or int64.
/// @return `[S/C]` on `device`.
///
/// Example:
/// ```
/// auto positions = posenc::context_parallel_positions(q_whole.size(1), rank, world_size, q_whole.device());
/// auto q = q_whole.index_select(1, positions);
/// ```
POSENC_API at::Tensor context_parallel_positions(
    int64_t seq_len,
    int64_t rank,
    int64_t world_size,
    c10::Device device = at::kCPU,
    at::ScalarType dtype = at::kLong);

/// The same for packed sequences, each of which is divided by itself; what a rank holds of them follows one another.
///
/// @param cu_seqlens  `[N + 1]`, int32 or int64: boundaries of the whole sequences, from 0 and never falling, each
///   length padded to a multiple of 2 C. Tokens behind the last boundary count as one more sequence.
/// @param num_tokens  T of the whole, a multiple of 2 C.
/// @return `(positions, indices)`, each `[T/C]`: the position of each token of the shard in its sequence, and its index
///   in the whole.
///
/// Example:
/// ```
/// auto [positions, indices] = posenc::context_parallel_packed_positions(cu_seqlens, tokens, rank, world_size);
/// auto q = q_whole.index_select(0, indices);  // q_whole [tokens, H, D]
/// ```
POSENC_API std::tuple<at::Tensor, at::Tensor> context_parallel_packed_positions(
    const at::Tensor& cu_seqlens,
    int64_t num_tokens,
    int64_t rank,
    int64_t world_size);

/// Options for `mrope_positions`. The defaults are those of Qwen2-VL.
///
/// Example:
/// ```
/// auto qwen2_5_vl = posenc::MropeOptions().tokens_per_second(2);
/// auto qwen3_vl = posenc::MropeOptions().separate_frames(true);
/// ```
struct POSENC_API MropeOptions {
  /// The token that stands for a merged patch of an image. Default: 151655.
  TORCH_ARG(int64_t, image_token_id) = 151655;
  /// The token that stands for a merged patch of a video. Default: 151656.
  TORCH_ARG(int64_t, video_token_id) = 151656;
  /// Patches along each side that one token stands for. Default: 2.
  TORCH_ARG(int64_t, spatial_merge_size) = 2;
  /// Temporal positions of one second of video (Qwen2.5-VL): frame f of a video sits at
  /// `floor(f * seconds_per_grid * tokens_per_second)`, in float32 as there. Default: 0, frame f sits at f.
  TORCH_ARG(double, tokens_per_second) = 0;
  /// Every frame of a video is an image of its own, with text between them that says when it is (Qwen3-VL).
  /// Default: false.
  TORCH_ARG(bool, separate_frames) = false;
};

/// Positions along time, height and width of text that holds images and videos, M-RoPE (Qwen2-VL, Wang et al. 2024,
/// https://arxiv.org/abs/2409.12191, section 2.1; Qwen2.5-VL, Bai et al. 2025, https://arxiv.org/abs/2502.13923,
/// section 2.1.2; Qwen3-VL, Bai et al. 2025, https://arxiv.org/abs/2511.21631).
///
/// Text has the same position on all three axes. With p the position that a text token in its place would have, the
/// token in frame f, row y and column x of an image or video is at `(p + f, p + y, p + x)`; what follows goes on at
/// one more than the largest position so far.
///
/// Everything is taken from the token ids where they are, so that nothing has to be fetched from the device: the
/// tokens of an image are a run of `image_token_id`, as many as its grid says, and images come in the order of
/// their grids, through one sequence after the other. Videos likewise.
///
/// @param input_ids  `[B, S]`, int32 or int64.
/// @param image_grid_thw,video_grid_thw  `[N, 3]`, int32 or int64, on the device of `input_ids`: frames, rows and
///   columns
///   of patches, before they are merged; rows and columns are multiples of `spatial_merge_size`. None: no images, or
///   no videos, whatever the ids.
/// @param seconds_per_grid  `[N]`, one for each video, of a floating dtype, on the device of `input_ids`: what
///   `tokens_per_second` needs. Without it, 1.
/// @param attention_mask  `[B, S]`, bool or integer: tokens where it is zero are padding. They are at position 0, and
///   the others are numbered as if they were not there.
/// @return `(positions, deltas)`: `[3, B, S]`, and `[B]` with the difference of the position and the index of the
///   token that comes after the S given ones. While decoding, token n is at `n + delta` on all axes.
///
/// Example:
/// ```
/// auto [positions, deltas] = posenc::mrope_positions(input_ids, posenc::MropeOptions(), image_grid_thw);
/// auto next = posenc::offset_positions(deltas + input_ids.size(1), /*seq_len=*/1);  // [B, 1]
/// ```
POSENC_API std::tuple<at::Tensor, at::Tensor> mrope_positions(
    const at::Tensor& input_ids,
    const MropeOptions& options = MropeOptions(),
    const std::optional<at::Tensor>& image_grid_thw = std::nullopt,
    const std::optional<at::Tensor>& video_grid_thw = std::nullopt,
    const std::optional<at::Tensor>& seconds_per_grid = std::nullopt,
    const std::optional<at::Tensor>& attention_mask = std::nullopt);

/// Rows and columns of the patches of packed images and videos: for the vision encoders of Qwen2-VL and its
/// successors, whose patches come window after window of those that are merged, and of Pixtral, whose patches come
/// row after row (`spatial_merge_size` 1).
///
/// @param grids  `[N, 3]` frames, rows and columns, or `[N, 2]` rows and columns, int32 or int64; with rows and
///   columns multiples of `spatial_merge_size`. Every frame starts anew.
/// @param num_tokens  T, not negative: the number of patches. Those behind the last grid are at row and column 0.
/// @param spatial_merge_size  patches along each side of a window, positive.
/// @return `[2, T]`: rows, then columns.
///
/// Example:
/// ```
/// auto qwen2_vl = posenc::grid_positions(image_grid_thw, patches.size(0), /*spatial_merge_size=*/2);
/// auto pixtral = posenc::grid_positions(image_sizes, patches.size(0));
/// ```
POSENC_API at::Tensor grid_positions(const at::Tensor& grids, int64_t num_tokens, int64_t spatial_merge_size = 1);

/// Positions of the vision encoder of Llama 4: patches row after row at `(x + 1, y + 1)`, columns first, and then the
/// class token at 0 on both axes, where the rotation leaves it as it is.
///
/// @param height,width  patches of an image along its sides, not negative.
/// @param num_images  images that follow one another, not negative.
/// @param dtype  int32 or int64.
/// @return `[2, num_images (height width + 1)]` on `device`: columns, then rows.
///
/// Example:
/// ```
/// auto positions = posenc::llama4_vision_positions(/*height=*/24, /*width=*/24);  // [2, 577]
/// ```
POSENC_API at::Tensor llama4_vision_positions(
    int64_t height,
    int64_t width,
    int64_t num_images = 1,
    c10::Device device = at::kCPU,
    at::ScalarType dtype = at::kLong);

}  // namespace posenc
