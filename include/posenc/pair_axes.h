#pragma once

#include <posenc/export.h>

#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <vector>

/// The argument `pair_axes` of `rotary_embedding` for published models: the axis of multi-axis positions that each
/// rotary pair reads.
namespace posenc {

/// Axes of M-RoPE (Qwen2-VL, Wang et al. 2024, https://arxiv.org/abs/2409.12191, section 2.1): time, height, width.
///
/// @param sections  number of pairs of each of 1 to 4 axes, each at least 1: `mrope_section` of model configurations.
///   Their sum is R/2.
/// @param interleaved  false: the first `sections[0]` pairs read axis 0, the next `sections[1]` axis 1, and so on
///   (Qwen2-VL, Qwen2.5-VL). true, with three sections: pair j reads axis 1 if `j % 3 == 1` and `j < 3 sections[1]`,
///   axis 2 if `j % 3 == 2` and `j < 3 sections[2]`, and axis 0 otherwise (Qwen3-VL, `mrope_interleaved`).
/// @return one axis for each pair.
/// @throws c10::Error  if there are too few or too many sections, if one is empty, or if interleaved sections give an
///   axis fewer pairs than its section.
///
/// Example:
/// ```
/// auto axes = posenc::mrope_pair_axes({16, 24, 24});
/// auto y = posenc::rotary_embedding(x, cos, sin, positions, false, false, axes);  // positions [3, B, S]
/// ```
POSENC_API std::vector<int64_t> mrope_pair_axes(at::IntArrayRef sections, bool interleaved = false);

/// Axes of positions on a 2-D grid, height (axis 0) and width (axis 1), as vision encoders use them.
///
/// @param num_pairs  R/2: even, so that both axes have the same number of pairs.
/// @param alternating  false: the first half of the pairs reads the height, the second half the width (Qwen2-VL's
///   vision encoder). true: pairs of even index read the height, those of odd index the width (Pixtral).
/// @return one axis for each pair.
/// @throws c10::Error  if `num_pairs` is odd or not positive.
///
/// Example:
/// ```
/// auto axes = posenc::grid_pair_axes(/*num_pairs=*/40);
/// auto y = posenc::rotary_embedding(x, cos, sin, positions, false, false, axes);  // positions [2, T]
/// ```
POSENC_API std::vector<int64_t> grid_pair_axes(int64_t num_pairs, bool alternating = false);

}  // namespace posenc
