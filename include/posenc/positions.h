#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/arg.h>

#include <cstdint>
#include <optional>
#include <tuple>

/// Positions of tokens as integer tensors, for the argument `positions` of the rotary operators: for KV caches, packed
/// sequences, context parallelism, images and video.
///
/// Results are on the device of the input tensors. No function waits for the device, so that CUDA graphs can capture
/// all of them: sizes (the number of tokens, of ranks) are host arguments, and the host neither reads nor checks the
/// values of input tensors. If these are invalid (descending boundaries, more image tokens than the grids have), the
/// positions are undefined; memory out of bounds is never read.
///
/// Positions have the dtype of the input tensors, int32 or int64. Functions without input tensors default to int64.
namespace posenc {

/// Positions `offset` to `offset + seq_len - 1`, for tokens that follow a cache of `offset` tokens.
///
/// @param offset  may be negative; the operators give NaN for a negative position.
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

/// The same with one offset for each sequence, for a batch that is decoded together.
///
/// @param offsets  `[B]`, int32 or int64.
/// @return `[B, S]`.
POSENC_API at::Tensor offset_positions(const at::Tensor& offsets, int64_t seq_len);

/// Positions of packed sequences: each sequence starts at 0, or at its offset.
///
/// @param cu_seqlens  `[N + 1]`, int32 or int64: boundaries of the sequences, as for attention kernels. The first is 0,
///   and they do not descend. Sequences may be empty. Tokens after the last boundary (usually padding) are one more
///   sequence, which starts at 0.
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

/// Positions of the tokens of one rank, for context parallelism with balanced load (Llama 3, Grattafiori et al. 2024,
/// section 3.3.2). The sequence is cut into 2 C chunks of equal length. Rank r of C holds chunks r and 2 C - 1 - r, in
/// this order, so that a causal mask leaves all ranks the same work. The positions are also the indices of these tokens
/// in the whole sequence.
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

/// The same for packed sequences. Each sequence is divided among the ranks; a rank holds its parts one after the other.
///
/// @param cu_seqlens  `[N + 1]`, int32 or int64: boundaries of the whole sequences. The first is 0, and they do not
///   descend. Each length is padded to a multiple of 2 C. Tokens after the last boundary are one more sequence.
/// @param num_tokens  T: number of tokens of all ranks together, a multiple of 2 C.
/// @return `(positions, indices)`, each `[T/C]`: the position of each token of the rank in its sequence, and its index
///   in the whole packed tensor.
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
  /// Id of the token for a merged patch of an image. Default: 151655.
  TORCH_ARG(int64_t, image_token_id) = 151655;
  /// Id of the token for a merged patch of a video. Default: 151656.
  TORCH_ARG(int64_t, video_token_id) = 151656;
  /// Number of patches along each side that are merged into one token. Default: 2.
  TORCH_ARG(int64_t, spatial_merge_size) = 2;
  /// Temporal positions per second of video (Qwen2.5-VL): frame f of a video is at temporal position
  /// `floor(f * seconds_per_grid * tokens_per_second)`, in float32 as in Qwen2.5-VL. Default: 0, frame f is at f.
  TORCH_ARG(double, tokens_per_second) = 0;
  /// Whether each frame of a video is a separate image, with its time as text between the frames (Qwen3-VL).
  /// Default: false.
  TORCH_ARG(bool, separate_frames) = false;
};

/// Positions in time, height and width for text with images and videos, M-RoPE (Qwen2-VL, Wang et al. 2024,
/// https://arxiv.org/abs/2409.12191, section 2.1; Qwen2.5-VL, Bai et al. 2025, https://arxiv.org/abs/2502.13923,
/// section 2.1.2; Qwen3-VL, Bai et al. 2025, https://arxiv.org/abs/2511.21631).
///
/// A text token has the same position on all three axes. If a text token at the start of an image or video would be at
/// p, the token in its frame f, row y and column x is at `(p + f, p + y, p + x)`. The token after the image or video is
/// at one more than the largest position so far.
///
/// Images are found by token ids on the device, without a copy to the host. The tokens of an image are a run of
/// `image_token_id`, as many as its grid says. Images are in the order of their grids, over all sequences of the batch.
/// The same holds for videos.
///
/// @param input_ids  `[B, S]`, int32 or int64.
/// @param image_grid_thw,video_grid_thw  `[N, 3]`, int32 or int64, on the device of `input_ids`: frames, rows and
///   columns of patches before merging. Rows and columns are multiples of `spatial_merge_size`. nullopt: tokens with
///   these ids are text.
/// @param seconds_per_grid  `[N]`, of a floating dtype, on the device of `input_ids`: seconds from one frame to the
///   next in each video. Requires `tokens_per_second`. Default: 1.
/// @param attention_mask  `[B, S]`, bool or integer: tokens with the value 0 are padding. They are at position 0, and
///   the other tokens are numbered without them.
/// @return `(positions, deltas)`: `[3, B, S]` and `[B]`. A delta is the position of the token after the S given ones,
///   minus its index S: while decoding, token n is at `n + delta` on all axes.
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

/// Rows and columns of the patches of packed images and videos, for vision encoders. Qwen2-VL and its successors order
/// patches by windows, each of which is merged into one token. Pixtral orders them by rows (`spatial_merge_size` 1).
///
/// @param grids  `[N, 3]` frames, rows and columns, or `[N, 2]` rows and columns, int32 or int64. Rows and columns are
///   multiples of `spatial_merge_size`. Each frame starts at row and column 0.
/// @param num_tokens  T, not negative: the number of patches. Patches after the last grid are at row and column 0.
/// @param spatial_merge_size  number of patches along each side of a window, positive. Default: 1.
/// @return `[2, T]`: rows, then columns.
///
/// Example:
/// ```
/// auto qwen2_vl = posenc::grid_positions(image_grid_thw, patches.size(0), /*spatial_merge_size=*/2);
/// auto pixtral = posenc::grid_positions(image_sizes, patches.size(0));
/// ```
POSENC_API at::Tensor grid_positions(const at::Tensor& grids, int64_t num_tokens, int64_t spatial_merge_size = 1);

/// Positions for the vision encoder of Llama 4: patches row by row, the one in column x and row y at `(x + 1, y + 1)`,
/// then the class token at `(0, 0)`, where the rotation does not change it.
///
/// @param height,width  number of rows and of columns of patches in each image, not negative.
/// @param num_images  number of consecutive images, not negative.
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
