#pragma once

#include <blockwise/padded.h>
#include <cpu/detail/attention_tiles.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/score_rows.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <type_traits>

// A call of attention divided into tasks of threads, and the rows of its tensors in packed buffers.
namespace posenc::cpu {

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

/// Most query rows of a block. The products of a block and a tile of keys reuse their operands in the second cache.
constexpr int64_t kBlockRows = 96;

/// Unused elements at the end of each row of a tile, so that a column does not fall into few sets of the first cache.
constexpr int64_t kRowPadding = 16;

/// Calls `make()` once per thread, and the functions that it returns with every task from 0 to `tasks - 1`. A thread
/// takes the next task when it has finished one, because tasks of a causal call differ in length.
template <typename Make>
void for_each_task(int64_t tasks, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto run = make();
    for (int64_t task = next++; task < tasks; task = next++) {
      run(task);
    }
  });
}

/// Uninitialised memory, aligned to a cache line.
template <typename Real>
class Buffer {
 public:
  explicit Buffer(int64_t elements) : memory_(new char[elements * sizeof(Real) + kAlignment]) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    data_ = reinterpret_cast<Real*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

  Real* get() const { return data_; }

 private:
  static constexpr std::uintptr_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  Real* data_;
};

/// The keys that the query rows of a call see.
class Visibility {
 public:
  explicit Visibility(const blockwise::Padded& call)
      : q_len_(call.q_len()),
        k_len_(call.k_len()),
        causal_(call.causal),
        query_offset_(call.query_offset),
        seqlens_q_(call.seqlens_q.defined() ? call.seqlens_q.contiguous() : at::Tensor()),
        seqlens_k_(call.seqlens_k.defined() ? call.seqlens_k.contiguous() : at::Tensor()) {}

  /// The position of query `row`, relative to key 0.
  int64_t position(int64_t batch, int64_t row) const {
    return row + (query_offset_.has_value() ? *query_offset_ : keys(batch) - queries(batch));
  }

  Range visible(int64_t batch, int64_t row) const {
    if (row >= queries(batch)) {
      return {0, 0};
    }
    const int64_t end = causal_ ? std::clamp<int64_t>(position(batch, row) + 1, 0, keys(batch)) : keys(batch);
    return {0, static_cast<int32_t>(end)};
  }

 private:
  int64_t queries(int64_t batch) const {
    return seqlens_q_.defined() ? seqlens_q_.const_data_ptr<int64_t>()[batch] : q_len_;
  }
  int64_t keys(int64_t batch) const {
    return seqlens_k_.defined() ? seqlens_k_.const_data_ptr<int64_t>()[batch] : k_len_;
  }

  int64_t q_len_, k_len_;
  bool causal_;
  std::optional<int64_t> query_offset_;
  at::Tensor seqlens_q_, seqlens_k_;
};

/// Query rows `begin` to `begin + rows - 1` of one head, with the keys that they see.
struct RowBlock {
  int64_t batch, head, begin;
  int rows;
  int64_t position;  // of the first row, relative to key 0
  Range visible[kBlockRows];
  Range keys;  // contains the keys that the rows see

  RowBlock(const Visibility& visibility, int64_t in_batch, int64_t in_head, int64_t first, int64_t count)
      : batch(in_batch),
        head(in_head),
        begin(first),
        rows(static_cast<int>(count)),
        position(visibility.position(batch, begin)),
        keys{kNone, 0} {
    for (int i = 0; i < rows; ++i) {
      visible[i] = visibility.visible(batch, begin + i);
      if (!visible[i].empty()) {
        keys = {std::min(keys.begin, visible[i].begin), std::max(keys.end, visible[i].end)};
      }
    }
  }

 private:
  static constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
};

/// The part of a block in the tile of keys `begin` to `begin + keys - 1`.
struct Tile {
  int64_t begin;
  int keys, width;            // width: rounded up to whole panels
  int64_t position;           // of the first row, relative to the tile
  Range visible[kBlockRows];  // for each row, relative to the tile
  bool is_empty = true;       // no row sees a key
  bool is_dense = true;       // all rows see all keys, and the keys are whole panels

  /// @param reaches  for each row, the distance beyond which keys have no part in the result
  Tile(const RowBlock& block, int64_t first, int64_t end, int panel, const int64_t* reaches)
      : begin(first),
        keys(static_cast<int>(end - first)),
        width(static_cast<int>(round_up(keys, panel))),
        position(block.position - first) {
    const auto relative = [&](int64_t key) { return static_cast<int32_t>(std::clamp<int64_t>(key, 0, keys)); };
    for (int i = 0; i < block.rows; ++i) {
      const int64_t nearest = position + i;
      visible[i] = {
          relative(std::max(block.visible[i].begin - begin, nearest - reaches[i])),
          relative(std::min(block.visible[i].end - begin, nearest + reaches[i] + 1))};
      is_empty = is_empty && visible[i].empty();
      is_dense = is_dense && visible[i].begin == 0 && visible[i].end == width;
    }
  }

  const Range* limits() const { return is_dense ? nullptr : visible; }

  /// Writes ranges of rows that contain all rows that see a key, for each key of the tile.
  void rows_of_keys(int rows, Range* result) const {
    int32_t ends[kBlockRows];    // the largest end of the visible keys of this and earlier rows
    int32_t begins[kBlockRows];  // the smallest begin of the visible keys of this and later rows
    int32_t end = 0;
    for (int i = 0; i < rows; ++i) {
      end = visible[i].empty() ? end : std::max(end, visible[i].end);
      ends[i] = end;
    }
    int32_t first = width;
    for (int i = rows - 1; i >= 0; --i) {
      first = visible[i].empty() ? first : std::min(first, visible[i].begin);
      begins[i] = first;
    }
    int32_t first_row = 0;
    int32_t end_row = 0;
    for (int32_t key = 0; key < width; ++key) {
      while (first_row < rows && ends[first_row] <= key) {
        ++first_row;
      }
      while (end_row < rows && begins[end_row] <= key) {
        ++end_row;
      }
      result[key] = {first_row, end_row};
    }
  }
};

/// The largest distance of a key whose probability is not 0 in a row. With `|q . k| <= |q| |k|`, the logit of a key at
/// distance d is at most `most - slope d`. Its exponential relative to `shift` is 0 below the range of `exponential`.
/// @param most  `|scale| |q| |k|` for the largest `|k|`; NaN or infinity: all keys
/// @param shift  at most the log-sum-exp of the row
template <typename Real>
int64_t reach(Real most, Real shift, Real slope) {
  constexpr int64_t kAll = int64_t{1} << 40;
  constexpr Real kRange = std::is_same_v<Real, double> ? Real(709) : Real(88);
  constexpr auto kRoundings = static_cast<Real>(1.001);  // of |q|, |k| and q . k
  const Real distance = (most * kRoundings - shift + kRange) / slope;
  return slope > 0 && distance < static_cast<Real>(kAll) ? std::max<int64_t>(-1, static_cast<int64_t>(distance)) : kAll;
}

/// The rows of each head of a tensor `[B, S, H, D]`.
template <typename T>
struct HeadRows {
  T* data;
  int64_t batch, token, head, channel;  // strides

  explicit HeadRows(const at::Tensor& x)
      : batch(x.stride(0)), token(x.stride(1)), head(x.stride(2)), channel(x.stride(3)) {
    if constexpr (std::is_const_v<T>) {
      data = static_cast<T*>(x.const_data_ptr());
    } else {
      data = static_cast<T*>(x.mutable_data_ptr());
    }
  }

  T* row(int64_t b, int64_t s, int64_t h) const { return data + b * batch + s * token + h * head; }
};

template <typename T, typename Real>
POSENC_CPU_CLONES void read_row(const T* from, int64_t stride, int64_t channels, Real* __restrict to) {
  if (stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = static_cast<Real>(from[c]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = static_cast<Real>(from[c * stride]);
    }
  }
}

/// Writes `factor * from`, rounded once.
template <typename T, typename Real>
POSENC_CPU_CLONES void write_row(const Real* __restrict from, Real factor, int64_t stride, int64_t channels, T* to) {
  if (stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      to[c] = static_cast<T>(factor * from[c]);
    }
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      to[c * stride] = static_cast<T>(factor * from[c]);
    }
  }
}

/// Reads rows `begin` to `begin + count - 1` of a head, `to` is `[count, channels]`.
template <typename T, typename Real>
void read_rows(
    const HeadRows<T>& x,
    int64_t batch,
    int64_t head,
    int64_t begin,
    int64_t count,
    int64_t channels,
    Real* to) {
  for (int64_t i = 0; i < count; ++i) {
    read_row(x.row(batch, begin + i, head), x.channel, channels, to + i * channels);
  }
}

template <typename Real>
POSENC_CPU_CLONES Real dot(const Real* a, const Real* b, int64_t channels) {
  Lanes<Real, kLanes> lanes(0);
  int64_t c = 0;
  for (; channels - c >= kLanes; c += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes.values[lane] += a[c + lane] * b[c + lane];
    }
  }
  for (int lane = 0; c < channels; ++c, ++lane) {
    lanes.values[lane] += a[c] * b[c];
  }
  return lanes.sum();
}

/// The largest Euclidean norm of rows `[count, channels]`; infinity if there is a NaN.
template <typename Real>
Real largest_norm(const Real* rows, int64_t count, int64_t channels) {
  Real largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Real square = dot(rows + i * channels, rows + i * channels, channels);
    largest = square <= largest ? largest : square;
    if (square != square) {
      return std::numeric_limits<Real>::infinity();
    }
  }
  return std::sqrt(largest);
}

/// Whether a row has no NaN and no infinity.
template <typename Real>
POSENC_CPU_CLONES bool is_finite(const Real* row, int64_t channels) {
  int64_t others = 0;
  for (int64_t c = 0; c < channels; ++c) {
    others += row[c] - row[c] == 0 ? 0 : 1;
  }
  return others == 0;
}

/// Replaces NaN and infinity by 0 in rows `[count, channels]`. Returns whether there were any.
template <typename Real>
bool make_finite(Real* rows, int64_t count, int64_t channels) {
  bool changed = false;
  for (int64_t i = 0; i < count; ++i) {
    Real* row = rows + i * channels;
    if (!is_finite(row, channels)) {
      std::replace_if(row, row + channels, [](Real x) { return !(x - x == 0); }, Real(0));
      changed = true;
    }
  }
  return changed;
}

/// Rows `[count, channels]` as panels of channels, `[panels, panel_stride / panel, panel]`, zeros past the channels.
template <typename Real>
POSENC_CPU_CLONES void panels_of_channels(
    const Real* __restrict rows,
    int64_t count,
    int64_t channels,
    int64_t panel,
    int64_t panel_stride,
    Real* __restrict to) {
  for (int64_t begin = 0; begin < channels; begin += panel) {
    const int64_t size = std::min(panel, channels - begin);
    for (int64_t i = 0; i < count; ++i) {
      const Real* in = rows + i * channels + begin;
      Real* out = to + begin / panel * panel_stride + i * panel;
      if (size == panel) {
        // Four at a time, because the compiler would call memcpy for each row.
        for (int64_t c = 0; c < panel; c += 4) {
          for (int64_t j = c; j < c + 4; ++j) {
            out[j] = in[j];
          }
        }
        continue;
      }
      for (int64_t c = 0; c < size; ++c) {
        out[c] = in[c];
      }
      for (int64_t c = size; c < panel; ++c) {
        out[c] = 0;
      }
    }
  }
}

/// Rows `[count, channels]` as panels of rows, `[panels, channels, panel]`, zeros past the rows.
template <typename Real>
POSENC_CPU_CLONES void panels_of_rows(
    const Real* __restrict rows,
    int64_t count,
    int64_t channels,
    int64_t panel,
    Real* __restrict to) {
  for (int64_t begin = 0; begin < count; begin += panel) {
    Real* out = to + begin * channels;
    const int64_t size = std::min(panel, count - begin);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < size; ++i) {
        out[c * panel + i] = rows[(begin + i) * channels + c];
      }
      for (int64_t i = size; i < panel; ++i) {
        out[c * panel + i] = 0;
      }
    }
  }
}

/// The slopes of all heads in `Real`; 0 if the call has none.
template <typename Real>
class Slopes {
 public:
  explicit Slopes(const blockwise::Padded& call)
      : slopes_(
            call.slopes.defined() ? call.slopes.to(c10::CppTypeToScalarType<Real>::value).contiguous() : at::Tensor()) {
  }

  Real slope(int64_t head) const { return slopes_.defined() ? slopes_.const_data_ptr<Real>()[head] : Real(0); }

 private:
  at::Tensor slopes_;
};

/// Number of query rows of a block: at most `kBlockRows`, a multiple of the rows of a product, and about equal for all.
inline int64_t rows_of_block(int64_t q_len) {
  constexpr int64_t kProductRows = 12;
  const int64_t blocks = std::max<int64_t>(1, (q_len + kBlockRows - 1) / kBlockRows);
  return round_up((q_len + blocks - 1) / blocks, kProductRows);
}

}  // namespace posenc::cpu
