#include <arguments/tensor.h>
#include <posenc/positions.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace posenc {
namespace {

using at::Tensor;

bool is_position_dtype(at::ScalarType dtype) {
  return dtype == at::kInt || dtype == at::kLong;
}

void check_dtype(const char* op, at::ScalarType dtype) {
  TORCH_CHECK(is_position_dtype(dtype), op, ": expected dtype int32 or int64, got ", dtype);
}

void check_not_negative(const char* op, const char* name, int64_t value) {
  TORCH_CHECK(value >= 0, op, ": expected a ", name, " that is not negative, got ", value);
}

/// Checks that positions below `count` fit into `dtype`.
void check_fits(const char* op, const char* name, int64_t count, at::ScalarType dtype) {
  TORCH_CHECK(
      dtype == at::kLong || count <= std::numeric_limits<int32_t>::max(), op, ": expected a ", name,
      " below 2^31 for positions of int32, got ", count);
}

void check_integers(const char* op, const char* name, const Tensor& tensor) {
  arguments::check_defined(op, name, tensor);
  TORCH_CHECK(
      is_position_dtype(tensor.scalar_type()), op, ": expected ", name, " of dtype int32 or int64, got ",
      tensor.scalar_type());
}

void check_device(const char* op, const char* name, const Tensor& tensor, const char* of, const Tensor& other) {
  TORCH_CHECK(
      tensor.device() == other.device(), op, ": expected ", name, " on the device of ", of, ", ", other.device(),
      ", got ", tensor.device());
}

void check_boundaries(const char* op, const Tensor& cu_seqlens) {
  check_integers(op, "cu_seqlens", cu_seqlens);
  TORCH_CHECK(
      cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": expected cu_seqlens of shape [N + 1], got ",
      cu_seqlens.sizes());
}

void check_rank(const char* op, int64_t rank, int64_t world_size) {
  TORCH_CHECK(world_size >= 1, op, ": expected a positive world_size, got ", world_size);
  TORCH_CHECK(
      rank >= 0 && rank < world_size, op, ": expected a rank of 0 to world_size - 1 = ", world_size - 1, ", got ",
      rank);
}

Tensor count_to(int64_t end, at::ScalarType dtype, const c10::Device& device) {
  return at::arange(end, at::TensorOptions().dtype(dtype).device(device));
}

/// The number of `ends`, which ascend, that are at most each of `values`: the index of the interval of each value.
Tensor interval_of(const Tensor& values, const Tensor& ends) {
  return at::searchsorted(ends, values, /*out_int32=*/false, /*right=*/true);
}

/// Images or videos as runs of consecutive tokens.
struct Grids {
  Tensor frames, rows, columns;  // [N], int64, so that no product overflows
  Tensor starts, ends;           // [N]: first token and end of each run

  /// @param merge  patches along each side of a token.
  Grids(const Tensor& grids, int64_t merge) {
    const Tensor wide = grids.to(at::kLong);
    rows = wide.select(1, -2).floor_divide(merge);
    columns = wide.select(1, -1).floor_divide(merge);
    frames = wide.size(1) == 3 ? wide.select(1, 0) : at::ones_like(rows);
    const Tensor lengths = frames * rows * columns;
    ends = lengths.cumsum(0);
    starts = ends - lengths;
  }

  /// The run of each of `tokens`; the last run for tokens behind it.
  Tensor run_of(const Tensor& tokens) const { return interval_of(tokens, ends).clamp_max(ends.size(0) - 1); }
};

/// `values[index]`, at least 1. It is used as a divisor also for tokens that are in no run.
Tensor divisor(const Tensor& values, const Tensor& index) {
  return values.index_select(0, index).clamp_min(1);
}

/// Positions of the tokens of images, or of videos.
struct VisionTokens {
  Tensor inside;              // whether the token is one of them; the other fields are valid for these only
  Tensor first;               // the first token of its image
  Tensor extent;              // the position behind the image minus the position at its start
  Tensor frame, row, column;  // positions relative to the start of the image
};

/// @param seconds  [N], or undefined.
VisionTokens vision_tokens(
    const Tensor& inside,
    const Tensor& grid_thw,
    int64_t merge,
    const Tensor& seconds,
    double tokens_per_second,
    bool separate_frames) {
  const Grids grids(grid_thw, merge);
  const Tensor number = inside.cumsum(0).sub(1).clamp_min(0);  // index among the tokens inside
  const Tensor run = grids.run_of(number);
  const Tensor columns = divisor(grids.columns, run);
  const Tensor rows = divisor(grids.rows, run);
  const Tensor of_frame = rows * columns;
  const Tensor place = number - grids.starts.index_select(0, run);
  const Tensor place_in_frame = place.remainder(of_frame);
  const auto position_of_frame = [&](const Tensor& frame) {
    if (tokens_per_second == 0) {
      return frame;
    }
    const Tensor wide = frame.to(at::kFloat);
    const Tensor scaled = seconds.defined() ? wide * seconds.to(at::kFloat).index_select(0, run) : wide;
    return scaled.mul(tokens_per_second).to(at::kLong);
  };

  VisionTokens result;
  result.inside = inside;
  result.row = place_in_frame.floor_divide(columns);
  result.column = place_in_frame.remainder(columns);
  const Tensor frame = place.floor_divide(of_frame);
  const Tensor largest_in_frame = at::maximum(rows, columns) - 1;
  if (separate_frames) {
    result.first = place_in_frame == 0;
    result.frame = at::zeros_like(frame);
    result.extent = largest_in_frame + 1;
  } else {
    result.first = place == 0;
    result.frame = position_of_frame(frame);
    const Tensor last_frame = position_of_frame(grids.frames.index_select(0, run) - 1);
    result.extent = at::maximum(last_frame, largest_in_frame) + 1;
  }
  return result;
}

/// Whether there is at least one grid.
bool check_grid_thw(const char* op, const char* name, const std::optional<Tensor>& grids, const Tensor& input_ids) {
  if (!grids.has_value()) {
    return false;
  }
  check_integers(op, name, *grids);
  TORCH_CHECK(
      grids->dim() == 2 && grids->size(1) == 3, op, ": expected ", name, " of shape [N, 3], got ", grids->sizes());
  check_device(op, name, *grids, "input_ids", input_ids);
  return grids->size(0) > 0;
}

}  // namespace

Tensor offset_positions(int64_t offset, int64_t seq_len, c10::Device device, at::ScalarType dtype) {
  constexpr const char* op = "posenc::offset_positions";
  check_dtype(op, dtype);
  check_not_negative(op, "seq_len", seq_len);
  TORCH_CHECK(
      offset <= std::numeric_limits<int64_t>::max() - seq_len, op, ": expected offset + seq_len below 2^63, got ",
      offset, " and ", seq_len);
  check_fits(op, "offset + seq_len", offset + seq_len, dtype);
  TORCH_CHECK(
      dtype == at::kLong || offset >= std::numeric_limits<int32_t>::min(), op,
      ": expected an offset of at least -2^31 for positions of int32, got ", offset);
  return at::arange(offset, offset + seq_len, at::TensorOptions().dtype(dtype).device(device));
}

Tensor offset_positions(const Tensor& offsets, int64_t seq_len) {
  constexpr const char* op = "posenc::offset_positions";
  check_integers(op, "offsets", offsets);
  TORCH_CHECK(offsets.dim() == 1, op, ": expected offsets of shape [B], got ", offsets.sizes());
  check_not_negative(op, "seq_len", seq_len);
  check_fits(op, "seq_len", seq_len, offsets.scalar_type());
  return offsets.unsqueeze(1) + count_to(seq_len, offsets.scalar_type(), offsets.device());
}

Tensor packed_positions(const Tensor& cu_seqlens, int64_t num_tokens, const std::optional<Tensor>& offsets) {
  constexpr const char* op = "posenc::packed_positions";
  check_boundaries(op, cu_seqlens);
  check_not_negative(op, "num_tokens", num_tokens);
  check_fits(op, "num_tokens", num_tokens, cu_seqlens.scalar_type());
  if (offsets.has_value()) {
    check_integers(op, "offsets", *offsets);
    TORCH_CHECK(
        offsets->dim() == 1 && offsets->size(0) == cu_seqlens.size(0) - 1, op, ": expected offsets of shape [N] = [",
        cu_seqlens.size(0) - 1, "], got ", offsets->sizes());
    TORCH_CHECK(
        offsets->scalar_type() == cu_seqlens.scalar_type(), op, ": expected offsets of the dtype of cu_seqlens, ",
        cu_seqlens.scalar_type(), ", got ", offsets->scalar_type());
    check_device(op, "offsets", *offsets, "cu_seqlens", cu_seqlens);
  }
  Tensor tokens = count_to(num_tokens, cu_seqlens.scalar_type(), cu_seqlens.device());
  if (cu_seqlens.size(0) == 1) {
    return tokens;
  }
  const Tensor sequence = interval_of(tokens, cu_seqlens.slice(0, 1).contiguous());
  // Tokens behind the last sequence start at the last boundary.
  const Tensor positions = tokens - cu_seqlens.index_select(0, sequence);
  return offsets.has_value() ? positions + at::constant_pad_nd(*offsets, {0, 1}).index_select(0, sequence) : positions;
}

Tensor context_parallel_positions(
    int64_t seq_len,
    int64_t rank,
    int64_t world_size,
    c10::Device device,
    at::ScalarType dtype) {
  constexpr const char* op = "posenc::context_parallel_positions";
  check_dtype(op, dtype);
  check_rank(op, rank, world_size);
  TORCH_CHECK(
      seq_len >= 0 && seq_len % (2 * world_size) == 0, op,
      ": expected a seq_len divisible by 2 world_size = ", 2 * world_size, ", got ", seq_len);
  check_fits(op, "seq_len", seq_len, dtype);
  const int64_t half = seq_len / (2 * world_size);
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const int64_t second = 2 * world_size - 1 - rank;
  return at::cat(
      {at::arange(rank * half, (rank + 1) * half, options), at::arange(second * half, (second + 1) * half, options)});
}

std::tuple<Tensor, Tensor> context_parallel_packed_positions(
    const Tensor& cu_seqlens,
    int64_t num_tokens,
    int64_t rank,
    int64_t world_size) {
  constexpr const char* op = "posenc::context_parallel_packed_positions";
  check_boundaries(op, cu_seqlens);
  check_rank(op, rank, world_size);
  TORCH_CHECK(
      num_tokens >= 0 && num_tokens % (2 * world_size) == 0, op,
      ": expected num_tokens divisible by 2 world_size = ", 2 * world_size, ", got ", num_tokens);
  check_fits(op, "num_tokens", num_tokens, cu_seqlens.scalar_type());
  // Boundaries of the whole, including the tokens behind the last sequence, and of the shard.
  const Tensor boundaries = at::cat({cu_seqlens, at::full({1}, num_tokens, cu_seqlens.options())});
  const Tensor of_shard = boundaries.floor_divide(world_size);
  const Tensor tokens = count_to(num_tokens / world_size, cu_seqlens.scalar_type(), cu_seqlens.device());
  const Tensor sequence = interval_of(tokens, of_shard.slice(0, 1)).clamp_max(cu_seqlens.size(0) - 1);
  const Tensor start = of_shard.index_select(0, sequence);
  const Tensor length = of_shard.index_select(0, sequence + 1) - start;
  const Tensor half = length.floor_divide(2);
  const Tensor i = tokens - start;
  const Tensor positions = at::where(i < half, half * rank + i, half * (2 * world_size - 1 - rank) + (i - half));
  return {positions, boundaries.index_select(0, sequence) + positions};
}

std::tuple<Tensor, Tensor> mrope_positions(
    const Tensor& input_ids,
    const MropeOptions& options,
    const std::optional<Tensor>& image_grid_thw,
    const std::optional<Tensor>& video_grid_thw,
    const std::optional<Tensor>& seconds_per_grid,
    const std::optional<Tensor>& attention_mask) {
  constexpr const char* op = "posenc::mrope_positions";
  check_integers(op, "input_ids", input_ids);
  TORCH_CHECK(input_ids.dim() == 2, op, ": expected input_ids of shape [B, S], got ", input_ids.sizes());
  TORCH_CHECK(
      options.spatial_merge_size() >= 1, op, ": expected a positive spatial_merge_size, got ",
      options.spatial_merge_size());
  TORCH_CHECK(
      options.image_token_id() != options.video_token_id(), op,
      ": expected image_token_id and video_token_id to differ, got ", options.image_token_id(), " for both");
  TORCH_CHECK(
      options.tokens_per_second() >= 0, op, ": expected tokens_per_second not to be negative, got ",
      options.tokens_per_second());
  TORCH_CHECK(
      options.tokens_per_second() == 0 || !options.separate_frames(), op,
      ": expected no tokens_per_second with separate_frames, got ", options.tokens_per_second());
  const bool has_images = check_grid_thw(op, "image_grid_thw", image_grid_thw, input_ids);
  const bool has_videos = check_grid_thw(op, "video_grid_thw", video_grid_thw, input_ids);
  Tensor seconds;
  if (seconds_per_grid.has_value()) {
    seconds = *seconds_per_grid;
    TORCH_CHECK(
        options.tokens_per_second() > 0 && video_grid_thw.has_value(), op,
        ": expected tokens_per_second and video_grid_thw with seconds_per_grid, got ",
        video_grid_thw.has_value() ? "no tokens_per_second" : "no video_grid_thw");
    TORCH_CHECK(
        seconds.defined() && seconds.is_floating_point() && seconds.dim() == 1 &&
            seconds.size(0) == video_grid_thw->size(0),
        op, ": expected seconds_per_grid of a floating dtype and shape [N] = [", video_grid_thw->size(0), "], got ",
        seconds.defined() ? c10::str(seconds.scalar_type(), " ", seconds.sizes()) : "an undefined tensor");
    check_device(op, "seconds_per_grid", seconds, "input_ids", input_ids);
  }
  const Tensor ids = input_ids.flatten();
  Tensor valid;
  if (attention_mask.has_value()) {
    const Tensor& mask = *attention_mask;
    TORCH_CHECK(
        mask.defined() && mask.sizes() == input_ids.sizes() && !mask.is_floating_point() && !mask.is_complex(), op,
        ": expected attention_mask of an integer dtype or bool and the shape of input_ids, ", input_ids.sizes(),
        ", got ", mask.defined() ? c10::str(mask.scalar_type(), " ", mask.sizes()) : "an undefined tensor");
    check_device(op, "attention_mask", mask, "input_ids", input_ids);
    valid = mask.flatten().ne(0);
  }

  // positions = cumsum(advance) - own + relative. A text token has advance = own = 1. All tokens of an image, or of a
  // frame with separate_frames, have own = extent; only the first one advances, by the extent, the others by 0.
  Tensor advance = valid.defined() ? valid.to(at::kLong) : at::ones_like(ids, at::kLong);
  Tensor own = at::ones_like(ids, at::kLong);
  Tensor relative = at::zeros({3, ids.size(0)}, own.options());
  const auto add = [&](int64_t token_id, const Tensor& grid_thw, double tokens_per_second, bool separate_frames) {
    const Tensor inside = valid.defined() ? ids.eq(token_id).logical_and(valid) : ids.eq(token_id);
    const VisionTokens tokens =
        vision_tokens(inside, grid_thw, options.spatial_merge_size(), seconds, tokens_per_second, separate_frames);
    own = at::where(inside, tokens.extent, own);
    advance = at::where(inside, tokens.extent * tokens.first, advance);
    relative = at::where(inside, at::stack({tokens.frame, tokens.row, tokens.column}), relative);
  };
  if (has_images) {
    add(options.image_token_id(), *image_grid_thw, /*tokens_per_second=*/0, /*separate_frames=*/false);
  }
  if (has_videos) {
    add(options.video_token_id(), *video_grid_thw, options.tokens_per_second(), options.separate_frames());
  }
  const Tensor behind = advance.view(input_ids.sizes()).cumsum(1);
  Tensor positions = (behind.flatten() - own) + relative;
  if (valid.defined()) {
    positions = at::where(valid, positions, at::zeros({}, positions.options()));
  }
  const Tensor deltas = advance.view(input_ids.sizes()).sum(1) - input_ids.size(1);
  return {
      positions.view({3, input_ids.size(0), input_ids.size(1)}).to(input_ids.scalar_type()),
      deltas.to(input_ids.scalar_type())};
}

Tensor grid_positions(const Tensor& grids, int64_t num_tokens, int64_t spatial_merge_size) {
  constexpr const char* op = "posenc::grid_positions";
  check_integers(op, "grids", grids);
  TORCH_CHECK(
      grids.dim() == 2 && (grids.size(1) == 2 || grids.size(1) == 3), op,
      ": expected grids of shape [N, 3] or [N, 2], got ", grids.sizes());
  check_not_negative(op, "num_tokens", num_tokens);
  check_fits(op, "num_tokens", num_tokens, grids.scalar_type());
  TORCH_CHECK(spatial_merge_size >= 1, op, ": expected a positive spatial_merge_size, got ", spatial_merge_size);
  if (grids.size(0) == 0) {
    return at::zeros({2, num_tokens}, grids.options());
  }
  const Grids runs(grids, /*merge=*/1);
  const Tensor tokens = count_to(num_tokens, at::kLong, grids.device());
  const Tensor run = runs.run_of(tokens);
  const Tensor columns = divisor(runs.columns, run);
  const Tensor place = (tokens - runs.starts.index_select(0, run)).remainder(divisor(runs.rows, run) * columns);
  const int64_t side = spatial_merge_size;
  const Tensor window = place.floor_divide(side * side);
  const Tensor place_in_window = place.remainder(side * side);
  const Tensor windows = columns.floor_divide(side).clamp_min(1);  // in each row of the grid
  const Tensor positions = at::stack(
      {window.floor_divide(windows).mul(side).add(place_in_window.floor_divide(side)),
       window.remainder(windows).mul(side).add(place_in_window.remainder(side))});
  const Tensor exists = tokens < runs.ends.select(0, -1);
  return at::where(exists, positions, at::zeros({}, positions.options())).to(grids.scalar_type());
}

Tensor llama4_vision_positions(
    int64_t height,
    int64_t width,
    int64_t num_images,
    c10::Device device,
    at::ScalarType dtype) {
  constexpr const char* op = "posenc::llama4_vision_positions";
  check_dtype(op, dtype);
  check_not_negative(op, "height", height);
  check_not_negative(op, "width", width);
  check_not_negative(op, "num_images", num_images);
  check_fits(op, "height", height, dtype);
  check_fits(op, "width", width, dtype);
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  const Tensor x = at::arange(1, width + 1, options).expand({height, width});
  const Tensor y = at::arange(1, height + 1, options).unsqueeze(1).expand({height, width});
  return at::constant_pad_nd(at::stack({x.flatten(), y.flatten()}), {0, 1}).repeat({1, num_images});
}

}  // namespace posenc
