#include <posenc/pair_axes.h>

#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>

namespace posenc {

std::vector<int64_t> mrope_pair_axes(at::IntArrayRef sections, bool interleaved) {
  constexpr const char* kName = "posenc::mrope_pair_axes";
  constexpr int64_t kMostPairs = int64_t{1} << 20;  // more than any head has; the sum cannot overflow
  TORCH_CHECK(
      interleaved ? sections.size() == 3 : !sections.empty() && sections.size() <= 4, kName, ": expected ",
      interleaved ? "three sections where they are interleaved" : "one to four sections", ", got ", sections);
  TORCH_CHECK(
      std::all_of(sections.begin(), sections.end(), [](int64_t pairs) { return pairs >= 1 && pairs <= kMostPairs; }),
      kName, ": expected sections of 1 to ", kMostPairs, " pairs, got ", sections);
  const int64_t num_pairs = std::accumulate(sections.begin(), sections.end(), int64_t{0});
  std::vector<int64_t> axes;
  axes.reserve(static_cast<size_t>(num_pairs));
  if (!interleaved) {
    for (size_t axis = 0; axis < sections.size(); ++axis) {
      axes.insert(axes.end(), static_cast<size_t>(sections[axis]), static_cast<int64_t>(axis));
    }
    return axes;
  }
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t axis = pair % 3;
    axes.push_back(axis != 0 && pair < 3 * sections[static_cast<size_t>(axis)] ? axis : 0);
  }
  for (const int64_t axis : {1, 2}) {
    const auto pairs = std::count(axes.begin(), axes.end(), axis);
    TORCH_CHECK(
        pairs == sections[static_cast<size_t>(axis)], kName, ": expected sections that interleave, got ", sections,
        ", of which axis ", axis, " would have ", pairs, " pairs");
  }
  return axes;
}

std::vector<int64_t> grid_pair_axes(int64_t num_pairs, bool alternating) {
  TORCH_CHECK(
      num_pairs > 0 && num_pairs % 2 == 0, "posenc::grid_pair_axes: expected a positive, even num_pairs, got ",
      num_pairs);
  std::vector<int64_t> axes(static_cast<size_t>(num_pairs));
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    axes[static_cast<size_t>(pair)] = alternating ? pair % 2 : pair / (num_pairs / 2);
  }
  return axes;
}

}  // namespace posenc
