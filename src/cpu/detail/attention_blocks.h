#pragma once

#include <blockwise/padded.h>
#include <cpu/detail/attention_tiles.h>

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>
#include <type_traits>

// A call of attention divided into tasks of threads, blocks of query rows, and tiles of keys.
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

/// The keys that the query rows of a call see.
class Visibility {
 public:
  explicit Visibility(const blockwise::Padded& call)
      : q_len_(call.q_len()),
        k_len_(call.k_len()),
        window_left_(call.window_left),
        window_right_(call.causal ? 0 : call.window_right),
        query_offset_(call.query_offset),
        seqlens_q_(call.seqlens_q.defined() ? call.seqlens_q.contiguous() : at::Tensor()),
        seqlens_k_(call.seqlens_k.defined() ? call.seqlens_k.contiguous() : at::Tensor()) {}

  /// The position of query `row`, relative to key 0.
  int64_t position(int64_t batch, int64_t row) const {
    return row + (query_offset_.has_value() ? *query_offset_ : keys(batch) - queries(batch));
  }

  /// The key that is nearest to the position of query `row`. Distances in the kernels are relative to it, so that they
  /// are exact for a query that is far from all keys.
  int64_t nearest_key(int64_t batch, int64_t row) const {
    return std::clamp<int64_t>(position(batch, row), 0, std::max<int64_t>(0, keys(batch) - 1));
  }

  /// The distance of that key from the query.
  int64_t distance(int64_t batch, int64_t row) const {
    return std::abs(position(batch, row) - nearest_key(batch, row));
  }

  Range visible(int64_t batch, int64_t row) const {
    if (row >= queries(batch)) {
      return {0, 0};
    }
    const int64_t at = position(batch, row);
    const auto key = [last = keys(batch)](int64_t k) { return static_cast<int32_t>(std::clamp<int64_t>(k, 0, last)); };
    return {
        window_left_.has_value() ? key(at - *window_left_) : 0,
        key(window_right_.has_value() ? at + *window_right_ + 1 : keys(batch))};
  }

 private:
  int64_t queries(int64_t batch) const {
    return seqlens_q_.defined() ? seqlens_q_.const_data_ptr<int64_t>()[batch] : q_len_;
  }
  int64_t keys(int64_t batch) const {
    return seqlens_k_.defined() ? seqlens_k_.const_data_ptr<int64_t>()[batch] : k_len_;
  }

  int64_t q_len_, k_len_;
  std::optional<int64_t> window_left_, window_right_;  // nullopt: all keys; a causal mask is a right window of 0
  std::optional<int64_t> query_offset_;
  at::Tensor seqlens_q_, seqlens_k_;
};

/// Query rows `begin` to `begin + rows - 1` of one head, with the keys that they see.
struct RowBlock {
  int64_t batch, head, begin;
  int rows;
  int64_t nearest[kBlockRows];  // for each row, the key that is nearest to it
  Range visible[kBlockRows];
  Range keys;  // contains the keys that the rows see

  RowBlock(const Visibility& visibility, int64_t in_batch, int64_t in_head, int64_t first, int64_t count)
      : batch(in_batch), head(in_head), begin(first), rows(static_cast<int>(count)), keys{kNone, 0} {
    for (int i = 0; i < rows; ++i) {
      nearest[i] = visibility.nearest_key(batch, begin + i);
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
  int keys, width;              // width: rounded up to whole panels
  int64_t nearest[kBlockRows];  // for each row, its nearest key, relative to the tile
  Range visible[kBlockRows];    // for each row, relative to the tile
  bool is_empty = true;         // no row sees a key
  bool is_dense = true;         // all rows see all keys, and the keys are whole panels

  /// @param reaches  for each row, the distance beyond which keys have no part in the result
  Tile(const RowBlock& block, int64_t first, int64_t end, int panel, const int64_t* reaches)
      : begin(first), keys(static_cast<int>(end - first)), width(static_cast<int>(round_up(keys, panel))) {
    const auto relative = [&](int64_t key) { return static_cast<int32_t>(std::clamp<int64_t>(key, 0, keys)); };
    for (int i = 0; i < block.rows; ++i) {
      nearest[i] = block.nearest[i] - begin;
      visible[i] = {
          relative(std::max(block.visible[i].begin - begin, nearest[i] - reaches[i])),
          relative(std::min(block.visible[i].end - begin, nearest[i] + reaches[i] + 1))};
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

/// The largest distance from the nearest key of a key whose probability is not 0 in a row. With `|q . k| <= |q| |k|`,
/// the logit of a key at distance d is at most `most - slope d`. Its exponential relative to `shift` is 0 below the
/// range of `exponential`.
/// @param most  `|scale| |q| |k|` for the largest `|k|`; NaN or infinity: all keys
/// @param shift  at most the log-sum-exp of the row
template <typename Real>
int64_t reach(Real most, Real shift, Real slope) {
  constexpr int64_t kAll = int64_t{1} << 40;
  constexpr Real kRange = std::is_same_v<Real, double> ? Real(709) : Real(88);
  constexpr auto kRoundings = static_cast<Real>(1.001);  // of |q|, |k| and q . k
  const Real distance = (most * kRoundings - shift + kRange) / slope;
  return slope > 0 && distance < static_cast<Real>(kAll) ? static_cast<int64_t>(std::max(distance, Real(-1))) : kAll;
}

/// The slopes `[Hq]` or `[B, Hq]` in `Real`; 0 if the call has none.
template <typename Real>
class Slopes {
 public:
  explicit Slopes(const blockwise::Padded& call) {
    if (call.slopes.defined()) {
      slopes_ = call.slopes.to(c10::CppTypeToScalarType<Real>::value).contiguous();
      batch_stride_ = slopes_.dim() == 1 ? 0 : slopes_.size(1);
    }
  }

  Real slope(int64_t batch, int64_t head) const {
    return slopes_.defined() ? slopes_.const_data_ptr<Real>()[batch * batch_stride_ + head] : Real(0);
  }

 private:
  at::Tensor slopes_;
  int64_t batch_stride_ = 0;
};

/// The magnitude of the bias of the nearest key of a query, which the logits in the kernels lack.
/// @param distance  of this key
template <typename Real>
Real nearest_bias(Real slope, int64_t distance) {
  return distance == 0 ? Real(0) : slope * static_cast<Real>(distance);  // not NaN for an infinite slope
}

/// Number of query rows of a block: at most `kBlockRows`, a multiple of the rows of a product, and about equal for all.
inline int64_t rows_of_block(int64_t q_len) {
  constexpr int64_t kProductRows = 12;
  const int64_t blocks = std::max<int64_t>(1, (q_len + kBlockRows - 1) / kBlockRows);
  return round_up((q_len + blocks - 1) / blocks, kProductRows);
}

}  // namespace posenc::cpu
