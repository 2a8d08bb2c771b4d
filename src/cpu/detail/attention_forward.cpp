#include <arguments/alibi.h>
#include <cpu/detail/attention.h>
#include <cpu/detail/attention_blocks.h>
#include <cpu/detail/attention_few_queries.h>
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
        k_columns_(call.batch() * call.k_heads() * wide_keys_ * channels_),
        v_rows_(call.batch() * call.k_heads() * wide_keys_ * wide_channels_),
        k_norms_(call.batch() * call.k_heads() * (wide_keys_ / kPackedKeys)),
        v_is_finite_(k_norms_.size(), 1) {}

  void run() {
    const int64_t chunks = wide_keys_ / kPackedKeys;
    for_each_task(call_.batch() * call_.k_heads() * chunks, [&] {
      return [this, chunks, rows = std::make_shared<Buffer<Real>>(kPackedKeys * channels_)](int64_t task) {
        pack(task / chunks, task % chunks, rows->get());
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
        : q(kBlockRows * of.channels_), scores(kBlockRows * kRowStride), sums(kBlockRows * of.wide_channels_) {}

    Buffer<Real> q, scores, sums;
  };

  static constexpr int64_t kRowStride = kTileKeys + kRowPadding;

  int64_t key_head(int64_t batch, int64_t q_head) const {
    return batch * call_.k_heads() + q_head / (call_.q_heads() / call_.k_heads());
  }

  /// Packs `kPackedKeys` keys and values of one head, and finds the largest norm of the keys and whether the values are
  /// finite.
  void pack(int64_t head, int64_t chunk, Real* rows) {
    const int64_t begin = chunk * kPackedKeys;
    const int64_t keys = std::min(kPackedKeys, call_.k_len() - begin);
    const int64_t b = head / call_.k_heads();
    const int64_t h = head % call_.k_heads();
    read_rows(k_, b, h, begin, keys, channels_, rows);
    panels_of_rows(rows, keys, channels_, kernels_.panel, k_columns_.get() + (head * wide_keys_ + begin) * channels_);
    if (call_.slopes.defined()) {
      k_norms_[head * (wide_keys_ / kPackedKeys) + chunk] = largest_norm(rows, keys, channels_);
    }
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
      norms[i] = call_.slopes.defined() ? largest_norm(q + i * channels_, 1, channels_) : Real(0);
    }
    if (!block.keys.empty()) {
      // From the nearest keys outwards: the further ones often have no part in the result.
      const int64_t first = block.keys.begin / kernels_.panel * kernels_.panel;
      const int64_t tiles = (block.keys.end - first + kTileKeys - 1) / kTileKeys;
      const int64_t nearest = std::clamp<int64_t>(block.nearest[block.rows - 1], block.keys.begin, block.keys.end - 1);
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
    const auto softcap = static_cast<Real>(call_.softcap.value_or(0));
    const Real slope = slopes_.slope(block.batch, block.head);
    const Real most = std::abs(scale) * k_norm(head, keys.begin, keys.end);
    int64_t reaches[kBlockRows];
    for (int i = 0; i < block.rows; ++i) {
      reaches[i] = reach(most * norms[i], rows[i].maximum, slope);
    }
    const Tile tile(block, keys.begin, keys.end, kernels_.panel, reaches);
    if (tile.is_empty) {
      return;
    }
    multiply_keys(block, tile, scratch);
    for (int i = 0; i < block.rows; ++i) {
      const auto position = static_cast<Real>(tile.nearest[i]);
      Real* scores = scratch.scores.get() + i * kRowStride;
      kernels_.softmax_row({scores, tile.visible[i], tile.width, scale, slope, position, softcap}, rows[i]);
    }
    add_values(block, tile, scratch);
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

  void finish(const RowBlock& block, int i, const SoftmaxRow<Real>& row) {
    const int64_t query = block.begin + i;
    const bool vanishes = row.sum == 0;  // no key is visible
    if (!vanishes) {
      add_infinities(block, i, row);
    }
    write_row(
        row.out, vanishes ? Real(0) : 1 / row.sum, out_.channel, channels_, out_.row(block.batch, query, block.head));
    lse_[(block.batch * call_.q_heads() + block.head) * call_.q_len() + query] = vanishes
        ? -std::numeric_limits<Real>::infinity()
        : row.maximum + std::log(row.sum) -
            nearest_bias(slopes_.slope(block.batch, block.head), visibility_.distance(block.batch, query));
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
      const auto begin = static_cast<int32_t>(chunk * kPackedKeys);
      const auto end = static_cast<int32_t>(std::min<int64_t>((chunk + 1) * kPackedKeys, visible.end));
      add_not_finite(
          v_, block.batch, head % call_.k_heads(), {std::max(begin, visible.begin), end}, channels_, row.out);
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
  Buffer<Real> k_columns_;                        // [B, Hk, wide_keys / panel, D, panel]
  Buffer<Real> v_rows_;                           // [B, Hk, wide_channels / panel, wide_keys, panel]
  std::vector<Real> k_norms_;      // [B, Hk, wide_keys / kPackedKeys], the largest of these keys; zeros without slopes
  std::vector<char> v_is_finite_;  // [B, Hk, wide_keys / kPackedKeys]
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention(const blockwise::Padded& call) {
  at::Tensor out = at::empty_like(call.q);
  at::Tensor lse = at::empty(
      {call.batch(), call.q_heads(), call.q_len()},
      call.q.options().dtype(arguments::alibi_slopes_dtype(call.q.scalar_type())));
  if (lse.numel() > 0 && call.q_len() <= kFewQueries) {
    attention_of_few_queries(call, out, lse);
  } else if (lse.numel() > 0) {
    for_dtype(call.q.scalar_type(), [&](auto type) { Forward<typename decltype(type)::type>(call, out, lse).run(); });
  }
  return {out, lse};
}

}  // namespace posenc::cpu
