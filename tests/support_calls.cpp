#include "support.h"

#include <posenc/reference.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <algorithm>

namespace posenc::test {

const char* strides_name(Strides strides) {
  constexpr const char* kNames[kStrides] = {"dense",      "head_major",  "token_major", "head_slice",
                                            "odd_offset", "every_other", "reversed",    "one_batch",
                                            "one_token",  "one_head",    "one_channel", "one_value"};
  return kNames[static_cast<int>(strides)];
}

namespace {

const char* const kPositionShapeNames[kPositionShapes] = {"absent", "per_token", "per_batch"};
const char* const kPositionStridesNames[kPositionStrides] = {"dense", "every_other", "expanded"};
const char* const kPairAxesNames[kPairAxes] = {"chunked", "cycled", "random"};
const char* const kTableShapeNames[kTableShapes] = {"by_position", "per_token", "per_token_shared"};
const char* const kTableStridesNames[kTableStrides] = {"dense", "slice", "transposed", "one_row"};

at::Tensor random_dense(at::IntArrayRef sizes, const Target& target) {
  return at::randn(sizes, at::kDouble).to(target.device, target.dtype);
}

at::Tensor random_table(at::IntArrayRef sizes, const Target& target, TableStrides strides) {
  std::vector<int64_t> stored = sizes.vec();
  switch (strides) {
    case TableStrides::dense:
      break;
    case TableStrides::slice:
      stored.back() += 3;
      return random_dense(stored, target).narrow(-1, 1, sizes.back());
    case TableStrides::transposed:
      std::swap(stored[stored.size() - 1], stored[stored.size() - 2]);
      return random_dense(stored, target).transpose(-1, -2);
    case TableStrides::one_row:
      stored[stored.size() - 2] = 1;
      return random_dense(stored, target).expand(sizes);
  }
  return random_dense(sizes, target);
}

at::Tensor random_positions(const RotaryCase& c, int64_t length, at::DeviceType device) {
  const auto draw = [&](at::IntArrayRef sizes) {
    return at::randint(length, sizes, at::kLong).to(device, c.position_dtype);
  };
  const bool per_batch = c.positions == PositionShape::per_batch;
  std::vector<int64_t> sizes = per_batch ? std::vector<int64_t>{c.batch, c.tokens} : std::vector<int64_t>{c.tokens};
  if (c.axes > 0) {
    sizes.insert(sizes.begin(), c.axes);
  }
  std::vector<int64_t> stored = sizes;
  switch (c.position_strides) {
    case PositionStrides::dense:
      break;
    case PositionStrides::every_other: {  // dimensions stored in reverse order
      std::reverse(stored.begin(), stored.end());
      stored.back() *= 2;
      const at::Tensor drawn = draw(stored).slice(-1, 0, stored.back(), 2);
      return drawn.dim() == 3 ? drawn.permute({2, 1, 0}) : drawn.t();
    }
    case PositionStrides::expanded:
      stored[stored.size() - (per_batch ? 2 : 1)] = 1;
      return draw(stored).expand(sizes);
  }
  return draw(sizes);
}

std::vector<int64_t> pair_axes_of(const RotaryCase& c) {
  const int64_t pairs = c.rotary_dim / 2;
  std::vector<int64_t> axes(static_cast<size_t>(pairs));
  for (int64_t i = 0; i < pairs; ++i) {
    axes[i] = c.pair_axes == PairAxes::chunked ? i * c.axes / pairs
        : c.pair_axes == PairAxes::cycled      ? i % c.axes
                                               : at::randint(c.axes, {1}, at::kLong).item<int64_t>();
  }
  return axes;
}

}  // namespace

std::vector<int64_t> RotaryCase::sizes(int64_t heads) const {
  return packed ? std::vector<int64_t>{tokens, heads, head_dim} : std::vector<int64_t>{batch, tokens, heads, head_dim};
}

std::ostream& operator<<(std::ostream& stream, const RotaryCase& c) {
  return stream << c.name << ": q " << at::IntArrayRef(c.sizes(c.q_heads)) << " " << strides_name(c.q_strides) << ", k "
                << at::IntArrayRef(c.sizes(c.k_heads)) << " " << strides_name(c.k_strides) << ", rotary_dim "
                << c.rotary_dim << ", tables " << kTableShapeNames[static_cast<int>(c.tables)] << " "
                << kTableStridesNames[static_cast<int>(c.table_strides)] << " with " << c.spare_rows
                << " spare rows, positions " << kPositionShapeNames[static_cast<int>(c.positions)] << " "
                << kPositionStridesNames[static_cast<int>(c.position_strides)] << " " << c.position_dtype
                << (c.axes > 0 ? c10::str(" of ", c.axes, " axes ", kPairAxesNames[static_cast<int>(c.pair_axes)]) : "")
                << (c.interleaved ? ", interleaved" : "") << (c.conjugate ? ", conjugate" : "");
}

at::Tensor random_tensor(at::IntArrayRef sizes, const Target& target, Strides strides) {
  const size_t dims = sizes.size();
  std::vector<int64_t> stored = sizes.vec();
  const auto expanded = [&](size_t dim) {
    stored[dim] = 1;
    return random_dense(stored, target).expand(sizes);
  };
  switch (strides) {
    case Strides::dense:
      break;
    case Strides::head_major:
      std::swap(stored[dims - 2], stored[dims - 3]);
      return random_dense(stored, target).transpose(-2, -3);
    case Strides::token_major:
      std::swap(stored[0], stored[dims - 3]);
      return random_dense(stored, target).transpose(0, -3);
    case Strides::head_slice:
      stored[dims - 2] += 3;
      return random_dense(stored, target).narrow(-2, 1, sizes[dims - 2]);
    case Strides::odd_offset: {
      const int64_t count = c10::multiply_integers(sizes);
      return random_dense({count + 1}, target).narrow(0, 1, count).view(sizes);
    }
    case Strides::every_other:
      stored[dims - 1] *= 2;
      return random_dense(stored, target).slice(-1, 0, stored[dims - 1], 2);
    case Strides::reversed: {
      std::reverse(stored.begin(), stored.end());
      std::vector<int64_t> order(dims);
      for (size_t i = 0; i < dims; ++i) {
        order[i] = static_cast<int64_t>(dims - 1 - i);
      }
      return random_dense(stored, target).permute(order);
    }
    case Strides::one_batch:
      return expanded(0);
    case Strides::one_token:
      return expanded(dims - 3);
    case Strides::one_head:
      return expanded(dims - 2);
    case Strides::one_channel:
      return expanded(dims - 1);
    case Strides::one_value:
      return random_dense({}, target).expand(sizes);
  }
  return random_dense(sizes, target);
}

RotaryInputs make_inputs(const RotaryCase& c, const Target& target) {
  RotaryInputs in;
  in.q = random_tensor(c.sizes(c.q_heads), target, c.q_strides);
  in.k = random_tensor(c.sizes(c.k_heads), target, c.k_strides);
  const int64_t length = c.tokens + c.spare_rows;
  std::vector<int64_t> table_sizes{length, c.rotary_dim / 2};
  if (c.tables != TableShape::by_position) {
    table_sizes = {c.tables == TableShape::per_token ? c.batch : 1, c.tokens, c.rotary_dim / 2};
  }
  const Target table_target{target.device, table_dtype(target.dtype)};
  in.cos = random_table(table_sizes, table_target, c.table_strides);
  in.sin = random_table(table_sizes, table_target, c.table_strides);
  if (c.positions != PositionShape::absent) {
    in.positions = random_positions(c, length, target.device);
    if (c.axes > 0) {
      in.pair_axes = pair_axes_of(c);
    }
  }
  in.interleaved = c.interleaved;
  in.conjugate = c.conjugate;
  return in;
}

at::Tensor rotate(const RotaryInputs& in, const at::Tensor& x) {
  return posenc::rotary_embedding(x, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
}

std::tuple<at::Tensor, at::Tensor> rotate_qk(const RotaryInputs& in) {
  return posenc::rotary_embedding_qk(
      in.q, in.k, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
}

at::Tensor rotate_reference(const RotaryInputs& in, const at::Tensor& x) {
  return posenc::reference::rotary_embedding(
      x, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
}

RotaryInputs backwards(const RotaryInputs& in) {
  RotaryInputs back = in;
  back.conjugate = !in.conjugate;
  return back;
}

RotaryInputs in_float64(const RotaryInputs& in) {
  const auto widen = [](const at::Tensor& x) { return x.detach().to(at::kCPU, at::kDouble); };
  RotaryInputs wide = in;
  wide.q = in.q.defined() ? widen(in.q) : in.q;
  wide.k = in.k.defined() ? widen(in.k) : in.k;
  wide.cos = widen(in.cos);
  wide.sin = widen(in.sin);
  if (in.positions) {
    wide.positions = in.positions->to(at::kCPU, at::kLong);
  }
  return wide;
}

}  // namespace posenc::test
