#pragma once

#include <posenc/export.h>

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <vector>

/// Which axis of multi-axis positions each rotary pair reads: the `pair_axes` of `rotary_embedding` for published
/// models.
namespace posenc {

/// Axes of M-RoPE (Qwen2-VL, Wang et al. 2024, https://arxiv.org/abs/2409.12191, section 2.1): time, height, width.
///
/// @param sections  number of pairs of each axis, 1 to 4 of them and each at least 1: `mrope_section` of model
///   configurations. Their sum is R/2.
/// @param interleaved  false: the first pairs read the first axis, the next the second, and so on (Qwen2-VL,
///   Qwen2.5-VL). true: pair j reads axis 1 where `j % 3 == 1` and `j < 3 sections[1]`, axis 2 where `j % 3 == 2` and
///   `j < 3 sections[2]`, and axis 0 elsewhere (Qwen3-VL, `mrope_interleaved`); three sections.
/// @return one axis for each pair.
/// @throws c10::Error  where there are too few or too many sections, where one is empty, or where interleaved ones do
///   not fit: an axis would have fewer pairs than its section.
///
/// Example:
/// ```
/// auto axes = posenc::mrope_pair_axes({16, 24, 24});
/// auto y = posenc::rotary_embedding(x, cos, sin, positions, false, false, axes);  // positions [3, B, S]
/// ```
POSENC_API std::vector<int64_t> mrope_pair_axes(at::IntArrayRef sections, bool interleaved = false);

/// Axes of positions on a 2-D grid, height (axis 0) and width (axis 1), as vision encoders use them.
///
/// @param num_pairs  R/2: even, so that both axes have as many pairs.
/// @param alternating  false: the first half of the pairs reads the height, the second the width (Qwen2-VL's vision
///   encoder). true: even pairs read the height, odd ones the width (Pixtral).
/// @return one axis for each pair.
/// @throws c10::Error  where `num_pairs` is odd or not positive.
///
/// Example:
/// ```
/// auto axes = posenc::grid_pair_axes(/*num_pairs=*/40);
/// auto y = posenc::rotary_embedding(x, cos, sin, positions, false, false, axes);  // positions [2, T]
/// ```
POSENC_API std::vector<int64_t> grid_pair_axes(int64_t num_pairs, bool alternating = false);

}  // namespace posenc
