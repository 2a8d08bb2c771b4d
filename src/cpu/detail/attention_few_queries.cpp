#include <cpu/detail/attention_blocks.h>
#include <cpu/detail/attention_few_queries.h>
#include <cpu/detail/attention_rows.h>
#include <cpu/detail/dispatch.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace posenc::cpu {
namespace {

/// Keys of a tile.
constexpr int64_t kTileKeys = 256;

/// The keys of a head are divided among tasks if there are fewer heads than this.
constexpr int64_t kTasks = 16;

template <typename T>
class FewQueries {
 public:
  using Real = arithmetic_t<T>;

  FewQueries(const blockwise::Padded& call, const at::Tensor& out, const at::Tensor& lse)
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
        group_(call.q_heads() / call.k_heads()),
        rows_(group_ * call.q_len()),
        heads_(call.batch() * call.k_heads()),
        parts_(parts_of_keys()),
        sums_(parts_ * heads_ * rows_ * wide_channels_),
        results_(parts_ * heads_ * rows_),
        v_is_finite_(parts_ * heads_, 1) {}

  void run() {
    for_each_task(heads_ * parts_, [&] {
      return [this, scratch = std::make_shared<Scratch>(*this)](int64_t task) {
        const Part part{task / parts_ / call_.k_heads(), task / parts_ % call_.k_heads(), task % parts_};
        if (!compute(part, *scratch, /*finite_v=*/false)) {
          compute(part, *scratch, /*finite_v=*/true);
        }
      };
    });
    const int64_t grain = std::max<int64_t>(1, kGrainElements / (parts_ * wide_channels_));
    at::parallel_for(0, heads_ * rows_, grain, [&](int64_t begin, int64_t end) {
      std::vector<Real> sums(wide_channels_);
      for (int64_t row = begin; row < end; ++row) {
        merge(row / rows_, row % rows_, sums.data());
      }
    });
  }

 private:
  /// A part of the keys of one head.
  struct Part {
    int64_t batch, k_head, index;
  };

  struct Scratch {
    explicit Scratch(const FewQueries& of)
        : q(of.rows_ * of.channels_), scores(of.rows_ * kRowStride), rows(kTileKeys * of.channels_) {}

    Buffer<Real> q, scores;  // of all queries of a key head
    Buffer<Real> rows;       // of a tile of keys or values, if they are not read where they are
  };

  static constexpr int64_t kRowStride = kTileKeys + kRowPadding;

  /// The keys that queries of a sequence see.
  Range keys_of(int64_t batch) const { return RowBlock(visibility_, batch, 0, 0, call_.q_len()).keys; }

  int64_t parts_of_keys() const {
    int64_t longest = 0;
    for (int64_t b = 0; b < call_.batch(); ++b) {
      const Range keys = keys_of(b);
      longest = std::max<int64_t>(longest, keys.end - keys.begin);
    }
    const int64_t tiles = (longest + kTileKeys - 1) / kTileKeys;
    return std::max<int64_t>(1, std::min(tiles, (kTasks + heads_ - 1) / heads_));
  }

  Range keys_of(const Part& part) const {
    const Range keys = keys_of(part.batch);
    if (keys.empty()) {
      return {0, 0};
    }
    const int64_t step = round_up((keys.end - keys.begin + parts_ - 1) / parts_, kernels_.panel);
    const auto key = [&](int64_t index) {
      return static_cast<int32_t>(std::min<int64_t>(keys.begin + index * step, keys.end));
    };
    return {key(part.index), key(part.index + 1)};
  }

  /// Row `row` of the results of a part, in `results_`.
  int64_t index_of(int64_t part, int64_t head, int64_t row) const { return (part * heads_ + head) * rows_ + row; }

  /// The query head of row `row` of a key head.
  int64_t q_head(int64_t k_head, int64_t row) const { return k_head * group_ + row / call_.q_len(); }

  /// @param finite_v  Whether to replace values that are NaN or infinite by zeros. They reach all rows of a tile.
  /// @return whether the sums are finite; with `finite_v` true.
  bool compute(const Part& part, const Scratch& scratch, bool finite_v) {
    const int64_t head = part.batch * call_.k_heads() + part.k_head;
    SoftmaxRow<Real>* rows = results_.data() + index_of(part.index, head, 0);
    Real* sums = sums_.get() + index_of(part.index, head, 0) * wide_channels_;
    std::fill(sums, sums + rows_ * wide_channels_, Real(0));
    for (int64_t i = 0; i < rows_; ++i) {
      const T* query = q_.row(part.batch, i % call_.q_len(), q_head(part.k_head, i));
      read_row(query, q_.channel, channels_, scratch.q.get() + i * channels_);
      rows[i] = {
          -std::numeric_limits<Real>::infinity(), 0, sums + i * wide_channels_, static_cast<int>(wide_channels_)};
    }
    const Range keys = keys_of(part);
    for (int64_t begin = keys.begin; begin < keys.end; begin += kTileKeys) {
      add_tile(
          part, {static_cast<int32_t>(begin), static_cast<int32_t>(std::min<int64_t>(begin + kTileKeys, keys.end))},
          scratch, finite_v, rows);
    }
    return finite_v || is_finite(sums, rows_ * wide_channels_);
  }

  void add_tile(const Part& part, Range keys, const Scratch& scratch, bool finite_v, SoftmaxRow<Real>* rows) {
    const int32_t count = keys.end - keys.begin;
    const auto queries = static_cast<int>(rows_);
    const auto channels = static_cast<int>(channels_);
    Real* scores = scratch.scores.get();
    const Rows k = rows_of(k_, part, keys, scratch, /*copy=*/false);
    kernels_.multiply_rows(
        {scratch.q.get(), channels_, queries, k.data, k.stride, count, channels, scores, kRowStride});
    for (int64_t i = 0; i < rows_; ++i) {
      const int64_t query = i % call_.q_len();
      const Range visible = visibility_.visible(part.batch, query);
      const auto relative = [&](int32_t key) { return std::clamp(key - keys.begin, 0, count); };
      const auto position = static_cast<Real>(visibility_.nearest_key(part.batch, query) - keys.begin);
      kernels_.softmax_row(
          {scores + i * kRowStride,
           {relative(visible.begin), relative(visible.end)},
           static_cast<int>(round_up(count, kernels_.panel)),
           static_cast<Real>(call_.scale),
           slopes_.slope(part.batch, q_head(part.k_head, i)),
           position,
           static_cast<Real>(call_.softcap.value_or(0))},
          rows[i]);
    }
    const Rows v = rows_of(v_, part, keys, scratch, /*copy=*/finite_v);
    if (finite_v && make_finite(scratch.rows.get(), count, channels_)) {
      v_is_finite_[part.index * heads_ + part.batch * call_.k_heads() + part.k_head] = 0;
    }
    kernels_.add_rows({scores, kRowStride, queries, v.data, v.stride, count, channels, rows[0].out, wide_channels_});
  }

  /// Rows of keys or values, and the number of elements from a row to the next.
  struct Rows {
    const Real* data;
    int64_t stride;
  };

  /// The rows where they are, or a copy in `scratch`.
  Rows rows_of(const HeadRows<const T>& x, const Part& part, Range keys, const Scratch& scratch, bool copy) const {
    if constexpr (std::is_same_v<T, Real>) {
      if (x.channel == 1 && !copy) {
        return {x.row(part.batch, keys.begin, part.k_head), x.token};
      }
    }
    read_rows(x, part.batch, part.k_head, keys.begin, keys.end - keys.begin, channels_, scratch.rows.get());
    return {scratch.rows.get(), channels_};
  }

  /// Merges the results of all parts for row `row` of a key head.
  void merge(int64_t head, int64_t row, Real* sums) const {
    const int64_t batch = head / call_.k_heads();
    const int64_t query = row % call_.q_len();
    const int64_t of_q = q_head(head % call_.k_heads(), row);
    Real maximum = -std::numeric_limits<Real>::infinity();
    for (int64_t part = 0; part < parts_; ++part) {
      maximum = std::max(maximum, results_[index_of(part, head, row)].maximum);
    }
    std::fill(sums, sums + wide_channels_, Real(0));
    Real sum = 0;
    for (int64_t part = 0; part < parts_; ++part) {
      const SoftmaxRow<Real>& result = results_[index_of(part, head, row)];
      if (result.sum != 0) {
        const Real factor = maximum == result.maximum ? Real(1) : std::exp(result.maximum - maximum);
        sum += factor * result.sum;
        add_multiple(factor, result.out, channels_, sums);
      }
    }
    const bool vanishes = sum == 0;  // no key is visible
    if (!vanishes) {
      add_infinities(head, visibility_.visible(batch, query), sums);
    }
    write_row(sums, vanishes ? Real(0) : 1 / sum, out_.channel, channels_, out_.row(batch, query, of_q));
    lse_[(batch * call_.q_heads() + of_q) * call_.q_len() + query] = vanishes
        ? -std::numeric_limits<Real>::infinity()
        : maximum + std::log(sum) - nearest_bias(slopes_.slope(batch, of_q), visibility_.distance(batch, query));
  }

  /// Adds those elements of the visible rows of v, `[D]` each, that are NaN or infinite to the output row `sums`. The
  /// products with probabilities have zeros in their place, because a hidden one would give 0 * NaN = NaN.
  void add_infinities(int64_t head, Range visible, Real* sums) const {
    bool all_finite = true;
    for (int64_t part = 0; part < parts_; ++part) {
      all_finite = all_finite && v_is_finite_[part * heads_ + head] != 0;
    }
    if (!all_finite) {
      add_not_finite(v_, head / call_.k_heads(), head % call_.k_heads(), visible, channels_, sums);
    }
  }

  const blockwise::Padded& call_;
  HeadRows<const T> q_, k_, v_;
  HeadRows<T> out_;
  Real* lse_;  // [B, Hq, Sq]
  Visibility visibility_;
  Slopes<Real> slopes_;
  const TileKernels<Real>& kernels_;
  int64_t channels_, wide_channels_;       // rounded up to panels
  int64_t group_;                          // query heads of a key head
  int64_t rows_, heads_, parts_;           // queries of a key head, key heads of all sequences, parts of the keys
  Buffer<Real> sums_;                      // [parts, B, Hk, rows, wide_channels]
  std::vector<SoftmaxRow<Real>> results_;  // [parts, B, Hk, rows]
  std::vector<char> v_is_finite_;          // [parts, B, Hk]; 0 if values were replaced by zeros
};

}  // namespace

void attention_of_few_queries(const blockwise::Padded& call, const at::Tensor& out, const at::Tensor& lse) {
  for_dtype(call.q.scalar_type(), [&](auto type) { FewQueries<typename decltype(type)::type>(call, out, lse).run(); });
}

}  // namespace posenc::cpu
