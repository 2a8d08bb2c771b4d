#include <arguments/alibi.h>
#include <cpu/detail/attention.h>
#include <cpu/detail/attention_blocks.h>
#include <cpu/detail/attention_rows.h>
#include <cpu/detail/dispatch.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>
#include <vector>

namespace posenc::cpu {
namespace {

/// Keys of a tile.
constexpr int64_t kTileKeys = 256;

/// Keys that are packed in one task.
constexpr int64_t kPackedKeys = 128;

/// Up to this number of queries keys and values are read where they are: packing takes longer than their products.
constexpr int64_t kFewRows = 4;

template <typename T>
class Forward {
 public:
  using Real = arithmetic_t<T>;

  Forward(const blockwise::Padded& call, const at::Tensor& out, const at::Tensor& lse)
      : call_(call),
        q_(call.q),
        k_(call.k),
        v_(call.v),
        out_(out),
        lse_(lse.data_ptr<Real>()),
        visibility_(call),
        slopes_(call),
        kernels_(tile_kernels<Real>()),
        channels_(call.head_dim()),
        wide_channels_(round_up(channels_, kernels_.panel)),
        wide_keys_(round_up(call.k_len(), kPackedKeys)),
        is_packed_(call.q_len() > kFewRows),
        k_columns_(is_packed_ ? call.batch() * call.k_heads() * wide_keys_ * channels_ : 0),
        v_rows_(is_packed_ ? call.batch() * call.k_heads() * wide_keys_ * wide_channels_ : 0),
        k_norms_(call.batch() * call.k_heads() * (wide_keys_ / kPackedKeys)),
        v_is_finite_(k_norms_.size(), 1) {}

  void run() {
    const int64_t chunks = wide_keys_ / kPackedKeys;
    for_each_task(call_.batch() * call_.k_heads() * chunks, [&] {
      return [this, chunks, rows = std::make_shared<Buffer<Real>>(kPackedKeys * channels_)](int64_t task) {
        if (is_packed_) {
          pack(task / chunks, task % chunks, rows->get());
        } else {
          inspect(task / chunks, task % chunks, rows->get());
        }
      };
    });
    const int64_t step = rows_of_block(call_.q_len());
    const int64_t blocks = (call_.q_len() + step - 1) / step;
    for_each_task(call_.batch() * call_.q_heads() * blocks, [&] {
      return [this, step, blocks, scratch = std::make_shared<Scratch>(*this)](int64_t task) {
        const int64_t head = task / blocks;
        const int64_t begin = (blocks - 1 - task % blocks) * step;  // the longest causal rows first
        const int64_t rows = std::min(step, call_.q_len() - begin);
        compute({visibility_, head / call_.q_heads(), head % call_.q_heads(), begin, rows}, *scratch);
      };
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const Forward& of)
        : q(kBlockRows * of.channels_),
          scores(kBlockRows * kRowStride),
          sums(kBlockRows * of.wide_channels_),
          row(of.channels_) {}

    Buffer<Real> q, scores, sums, row;
  };

  static constexpr int64_t kRowStride = kTileKeys + kRowPadding;

  int64_t key_head(int64_t batch, int64_t q_head) const {
    return batch * call_.k_heads() + q_head / (call_.q_heads() / call_.k_heads());
  }

  /// Finds the largest norm of `kPackedKeys` keys of one head, and whether the values are finite, where they are.
  void inspect(int64_t head, int64_t chunk, Real* row) {
    const int64_t begin = chunk * kPackedKeys;
    const int64_t end = std::min(begin + kPackedKeys, call_.k_len());
    const int64_t index = head * (wide_keys_ / kPackedKeys) + chunk;
    const int64_t b = head / call_.k_heads();
    const int64_t h = head % call_.k_heads();
    Real largest = 0;
    for (int64_t key = begin; key < end; ++key) {
      largest = std::max(largest, largest_norm(in_real(k_.row(b, key, h), k_.channel, row), 1, channels_));
      if (!is_finite(in_real(v_.row(b, key, h), v_.channel, row), channels_)) {
        v_is_finite_[index] = 0;
      }
    }
    k_norms_[index] = largest;
  }

  /// Packs `kPackedKeys` keys and values of one head, with what `inspect` finds.
  void pack(int64_t head, int64_t chunk, Real* rows) {
    const int64_t begin = chunk * kPackedKeys;
    const int64_t keys = std::min(kPackedKeys, call_.k_len() - begin);
    const int64_t b = head / call_.k_heads();
    const int64_t h = head % call_.k_heads();
    read_rows(k_, b, h, begin, keys, channels_, rows);
    panels_of_rows(rows, keys, channels_, kernels_.panel, k_columns_.get() + (head * wide_keys_ + begin) * channels_);
    k_norms_[head * (wide_keys_ / kPackedKeys) + chunk] = largest_norm(rows, keys, channels_);
    read_rows(v_, b, h, begin, keys, channels_, rows);
    if (make_finite(rows, keys, channels_)) {
      v_is_finite_[head * (wide_keys_ / kPackedKeys) + chunk] = 0;
    }
    std::fill(rows + keys * channels_, rows + kPackedKeys * channels_, Real(0));
    panels_of_channels(
        rows, kPackedKeys, channels_, kernels_.panel, wide_keys_ * kernels_.panel,
        v_rows_.get() + head * wide_keys_ * wide_channels_ + begin * kernels_.panel);
  }

  void compute(const RowBlock& block, const Scratch& scratch) {
    SoftmaxRow<Real> rows[kBlockRows];
    std::fill(scratch.sums.get(), scratch.sums.get() + block.rows * wide_channels_, Real(0));
    for (int i = 0; i < block.rows; ++i) {
      rows[i] = {
          -std::numeric_limits<Real>::infinity(), 0, scratch.sums.get() + i * wide_channels_,
          static_cast<int>(wide_channels_)};
    }
    Real* q = scratch.q.get();
    read_rows(q_, block.batch, block.head, block.begin, block.rows, channels_, q);
    Real norms[kBlockRows];
    for (int i = 0; i < block.rows; ++i) {
      norms[i] = largest_norm(q + i * channels_, 1, channels_);
    }
    if (!block.keys.empty()) {
      // From the nearest keys outwards: the further ones often have no part in the result.
      const int64_t first = block.keys.begin / kernels_.panel * kernels_.panel;
      const int64_t tiles = (block.keys.end - first + kTileKeys - 1) / kTileKeys;
      const int64_t nearest =
          std::clamp<int64_t>(block.position + block.rows - 1, block.keys.begin, block.keys.end - 1);
      const int64_t start = (nearest - first) / kTileKeys;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = first + (i <= start ? start - i : i) * kTileKeys;
        add_tile(block, {begin, std::min<int64_t>(begin + kTileKeys, block.keys.end)}, scratch, norms, rows);
      }
    }
    for (int i = 0; i < block.rows; ++i) {
      finish(block, i, rows[i]);
    }
  }

  /// The largest norm of keys `begin` to `end - 1`, or of more keys.
  Real k_norm(int64_t head, int64_t begin, int64_t end) const {
    const auto first = k_norms_.begin() + head * (wide_keys_ / kPackedKeys);
    return *std::max_element(first + begin / kPackedKeys, first + (end + kPackedKeys - 1) / kPackedKeys);
  }

  struct Keys {
    int64_t begin, end;
  };

  /// @param norms  of the rows of q
  void add_tile(
      const RowBlock& block,
      const Keys& keys,
      const Scratch& scratch,
      const Real* norms,
      SoftmaxRow<Real>* rows) {
    const int64_t head = key_head(block.batch, block.head);
    const auto scale = static_cast<Real>(call_.scale);
    const Real slope = slopes_.slope(block.head);
    const Real most = std::abs(scale) * k_norm(head, keys.begin, keys.end);
    int64_t reaches[kBlockRows];
    for (int i = 0; i < block.rows; ++i) {
      reaches[i] = reach(most * norms[i], rows[i].maximum, slope);
    }
    const Tile tile(block, keys.begin, keys.end, kernels_.panel, reaches);
    if (tile.is_empty) {
      return;
    }
    if (is_packed_) {
      multiply_keys(block, tile, scratch);
    } else {
      multiply_keys_where_they_are(block, tile, scratch);
    }
    for (int i = 0; i < block.rows; ++i) {
      const auto position = static_cast<Real>(tile.position + i);
      Real* scores = scratch.scores.get() + i * kRowStride;
      kernels_.softmax_row({scores, tile.visible[i], tile.width, scale, slope, position}, rows[i]);
    }
    if (is_packed_) {
      add_values(block, tile, scratch);
    } else {
      add_values_where_they_are(block, tile, scratch);
    }
  }

  void multiply_keys(const RowBlock& block, const Tile& tile, const Scratch& scratch) {
    const Real* k = k_columns_.get() + (key_head(block.batch, block.head) * wide_keys_ + tile.begin) * channels_;
    kernels_.product(
        {scratch.q.get(), channels_, 1, k, channels_ * kernels_.panel, scratch.scores.get(), kRowStride, block.rows,
         tile.width / kernels_.panel, static_cast<int>(channels_), /*accumulate=*/false, tile.limits(), nullptr});
  }

  void add_values(const RowBlock& block, const Tile& tile, const Scratch& scratch) {
    const Real* v =
        v_rows_.get() + key_head(block.batch, block.head) * wide_keys_ * wide_channels_ + tile.begin * kernels_.panel;
    kernels_.product(
        {scratch.scores.get(), kRowStride, 1, v, wide_keys_ * kernels_.panel, scratch.sums.get(), wide_channels_,
         block.rows, static_cast<int>(wide_channels_ / kernels_.panel), tile.width, /*accumulate=*/true, nullptr,
         tile.limits()});
  }

  void multiply_keys_where_they_are(const RowBlock& block, const Tile& tile, const Scratch& scratch) {
    for (int i = 0; i < block.rows; ++i) {
      for (int32_t key = tile.visible[i].begin; key < tile.visible[i].end; ++key) {
        scratch.scores.get()[i * kRowStride + key] =
            dot(scratch.q.get() + i * channels_, row_of_key(k_, block, tile.begin + key, scratch), channels_);
      }
    }
  }

  void add_values_where_they_are(const RowBlock& block, const Tile& tile, const Scratch& scratch) {
    const int64_t chunks = key_head(block.batch, block.head) * (wide_keys_ / kPackedKeys);
    for (int i = 0; i < block.rows; ++i) {
      for (int32_t key = tile.visible[i].begin; key < tile.visible[i].end; ++key) {
        const Real* value = row_of_key(v_, block, tile.begin + key, scratch);
        if (v_is_finite_[chunks + (tile.begin + key) / kPackedKeys] == 0) {
          std::copy_n(value, channels_, scratch.row.get());
          make_finite(scratch.row.get(), 1, channels_);
          value = scratch.row.get();
        }
        add_multiple(
            scratch.scores.get()[i * kRowStride + key], value, channels_, scratch.sums.get() + i * wide_channels_);
      }
    }
  }

  /// The row of a key or value, valid until the next call.
  const Real* row_of_key(const HeadRows<const T>& x, const RowBlock& block, int64_t key, const Scratch& scratch) const {
    const T* row = x.row(block.batch, key, block.head / (call_.q_heads() / call_.k_heads()));
    return in_real(row, x.channel, scratch.row.get());
  }

  /// A row in `Real`: itself, or a copy in `copy`.
  const Real* in_real(const T* row, int64_t stride, Real* copy) const {
    if constexpr (std::is_same_v<T, Real>) {
      if (stride == 1) {
        return row;
      }
    }
    read_row(row, stride, channels_, copy);
    return copy;
  }

  void finish(const RowBlock& block, int i, const SoftmaxRow<Real>& row) {
    const int64_t query = block.begin + i;
    const bool vanishes = row.sum == 0;  // no key is visible
    if (!vanishes) {
      add_infinities(block, i, row);
    }
    write_row(
        row.out, vanishes ? Real(0) : 1 / row.sum, out_.channel, channels_, out_.row(block.batch, query, block.head));
    lse_[(block.batch * call_.q_heads() + block.head) * call_.q_len() + query] =
        vanishes ? -std::numeric_limits<Real>::infinity() : row.maximum + std::log(row.sum);
  }

  /// Adds the values that are NaN or infinite, which are packed as zeros, to the rows that see them. They would reach
  /// all rows of a tile as the product with a probability of 0.
  void add_infinities(const RowBlock& block, int i, const SoftmaxRow<Real>& row) {
    const int64_t head = key_head(block.batch, block.head);
    const int64_t chunks = wide_keys_ / kPackedKeys;
    const Range visible = block.visible[i];
    for (int64_t chunk = visible.begin / kPackedKeys; chunk * kPackedKeys < visible.end; ++chunk) {
      if (v_is_finite_[head * chunks + chunk] != 0) {
        continue;
      }
      const int64_t end = std::min<int64_t>((chunk + 1) * kPackedKeys, visible.end);
      for (int64_t key = std::max<int64_t>(chunk * kPackedKeys, visible.begin); key < end; ++key) {
        const T* value = v_.row(block.batch, key, head % call_.k_heads());
        for (int64_t c = 0; c < channels_; ++c) {
          const auto x = static_cast<Real>(value[c * v_.channel]);
          row.out[c] += x - x == 0 ? Real(0) : x;
        }
      }
    }
  }

  const blockwise::Padded& call_;
  HeadRows<const T> q_, k_, v_;
  HeadRows<T> out_;
  Real* lse_;
  Visibility visibility_;
  Slopes<Real> slopes_;
  const TileKernels<Real>& kernels_;
  int64_t channels_, wide_channels_, wide_keys_;  // rounded up to panels, and to packed keys
  bool is_packed_;                                // keys and values
  Buffer<Real> k_columns_;                        // [B, Hk, wide_keys / panel, D, panel]
  Buffer<Real> v_rows_;                           // [B, Hk, wide_channels / panel, wide_keys, panel]
  std::vector<Real> k_norms_;                     // [B, Hk, wide_keys / kPackedKeys], the largest of these keys
  std::vector<char> v_is_finite_;                 // [B, Hk, wide_keys / kPackedKeys]
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention(const blockwise::Padded& call) {
  at::Tensor out = at::empty_like(call.q);
  at::Tensor lse = at::empty(
      {call.batch(), call.q_heads(), call.q_len()},
      call.q.options().dtype(arguments::alibi_slopes_dtype(call.q.scalar_type())));
  if (lse.numel() > 0) {
    for_dtype(call.q.scalar_type(), [&](auto type) { Forward<typename decltype(type)::type>(call, out, lse).run(); });
  }
  return {out, lse};
}

}  // namespace posenc::cpu
