#include <arguments/alibi.h>
#include <cpu/detail/attention.h>
#include <cpu/detail/attention_blocks.h>
#include <cpu/detail/attention_rows.h>
#include <cpu/detail/dispatch.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <vector>

namespace posenc::cpu {
namespace {

/// Keys of a tile.
constexpr int64_t kTileKeys = 128;

/// The keys of a head are divided among tasks if there are fewer heads than this.
constexpr int64_t kTasks = 16;

/// The gradients of keys and values of a part of one key head are summed by one task. The gradient of q is the sum of
/// those of all parts of the keys, which are stored in float32 (float64) if there are several. The number of parts does
/// not depend on the number of threads.
template <typename T>
class Backward {
 public:
  using Real = arithmetic_t<T>;

  struct Gradients {
    at::Tensor q, k, v, slopes;
  };

  Backward(
      const blockwise::Padded& call,
      const at::Tensor& grad_out,
      const at::Tensor& grad_lse,
      const at::Tensor& out,
      const at::Tensor& lse,
      const Gradients& gradients)
      : call_(call),
        q_(call.q),
        k_(call.k),
        v_(call.v),
        grad_out_(grad_out),
        out_(out),
        grad_q_(gradients.q),
        grad_k_(gradients.k),
        grad_v_(gradients.v),
        grad_slopes_(gradients.slopes),
        contiguous_lse_(lse.contiguous()),
        lse_(contiguous_lse_.template const_data_ptr<Real>()),
        contiguous_grad_lse_(grad_lse.defined() ? grad_lse.to(lse.scalar_type()).contiguous() : at::Tensor()),
        grad_lse_(grad_lse.defined() ? contiguous_grad_lse_.template const_data_ptr<Real>() : nullptr),
        visibility_(call),
        slopes_(call),
        kernels_(tile_kernels<Real>()),
        channels_(call.head_dim()),
        wide_channels_(round_up(channels_, kernels_.panel)),
        group_(call.q_heads() / call.k_heads()) {
    const int64_t heads = call.batch() * call.k_heads();
    const int64_t tiles = std::max<int64_t>(1, (call.k_len() + kTileKeys - 1) / kTileKeys);
    const int64_t parts = std::min(tiles, (kTasks + heads - 1) / heads);
    part_keys_ = (tiles + parts - 1) / parts * kTileKeys;
    parts_ = std::max<int64_t>(1, (call.k_len() + part_keys_ - 1) / part_keys_);
    part_keys_ = std::min(part_keys_, round_up(call.k_len(), kTileKeys));
    rows_ = call.batch() * call.q_heads() * call.q_len();
    if (parts_ > 1) {
      q_parts_ = at::zeros({parts_, rows_, channels_}, contiguous_lse_.options());
    }
    if (grad_slopes_.defined()) {
      slope_terms_.resize(parts_ * rows_);
    }
  }

  void run() {
    for_each_task(call_.batch() * call_.k_heads() * parts_, [&] {
      return [this, scratch = std::make_shared<Scratch>(*this)](int64_t task) {
        // The heads with the smallest slopes first, which take longest.
        const int64_t head = call_.batch() * call_.k_heads() - 1 - task / parts_;
        compute({head / call_.k_heads(), head % call_.k_heads(), task % parts_}, *scratch);
      };
    });
    if (parts_ > 1) {
      sum_parts_of_q();
    }
    if (grad_slopes_.defined()) {
      sum_slope_terms();
    }
  }

 private:
  /// A part of the keys of one head.
  struct Part {
    int64_t batch, k_head, index;
  };

  struct Scratch {
    explicit Scratch(const Backward& of)
        : rows(std::max(kBlockRows, kTileKeys) * of.channels_),
          q_panels(kBlockRows * of.wide_channels_),
          grad(kBlockRows * of.channels_),
          grad_panels(kBlockRows * of.wide_channels_),
          scores(kBlockRows * kRowStride),
          dp(kBlockRows * kRowStride),
          factors(kRowStride),
          dq(kBlockRows * of.wide_channels_),
          k_columns(of.part_keys_ * of.channels_),
          v_columns(of.part_keys_ * of.channels_),
          k_rows(of.part_keys_ * of.wide_channels_),
          dk(of.part_keys_ * of.wide_channels_),
          dv(of.part_keys_ * of.wide_channels_),
          k_norms(of.part_keys_ / kTileKeys) {}

    Buffer<Real> rows;  // of q, or of keys while they are packed
    Buffer<Real> q_panels, grad, grad_panels;
    Buffer<Real> scores, dp;  // [kBlockRows, kRowStride]
    Buffer<Real> factors;     // of one row
    Buffer<Real> dq;
    Buffer<Real> k_columns, v_columns;  // [part_keys / panel, D, panel]
    Buffer<Real> k_rows;                // [wide_channels / panel, part_keys, panel], finite
    Buffer<Real> dk, dv;                // [part_keys, wide_channels]
    Buffer<Real> k_norms;               // the largest norm of the keys of each tile; zeros without slopes
  };

  static constexpr int64_t kRowStride = kTileKeys + kRowPadding;

  int64_t row_index(int64_t batch, int64_t head, int64_t row) const {
    return (batch * call_.q_heads() + head) * call_.q_len() + row;
  }

  Range keys_of(const Part& part) const {
    return {
        static_cast<int32_t>(part.index * part_keys_),
        static_cast<int32_t>(std::min((part.index + 1) * part_keys_, call_.k_len()))};
  }

  void compute(const Part& part, const Scratch& scratch) {
    const Range keys = keys_of(part);
    pack(part, keys, scratch);
    std::fill(scratch.dk.get(), scratch.dk.get() + part_keys_ * wide_channels_, Real(0));
    std::fill(scratch.dv.get(), scratch.dv.get() + part_keys_ * wide_channels_, Real(0));
    const int64_t step = rows_of_block(call_.q_len());
    for (int64_t head = part.k_head * group_; head < (part.k_head + 1) * group_; ++head) {
      for (int64_t begin = 0; begin < call_.q_len(); begin += step) {
        const RowBlock block(visibility_, part.batch, head, begin, std::min(step, call_.q_len() - begin));
        add_block(block, part, {std::max(keys.begin, block.keys.begin), std::min(keys.end, block.keys.end)}, scratch);
      }
    }
    for (int64_t key = keys.begin; key < keys.end; ++key) {
      const int64_t offset = (key - keys.begin) * wide_channels_;
      write_row(
          scratch.dk.get() + offset, static_cast<Real>(call_.scale), grad_k_.channel, channels_,
          grad_k_.row(part.batch, key, part.k_head));
      write_row(
          scratch.dv.get() + offset, Real(1), grad_v_.channel, channels_, grad_v_.row(part.batch, key, part.k_head));
    }
  }

  void pack(const Part& part, Range keys, const Scratch& scratch) {
    const int panel = kernels_.panel;
    Real* rows = scratch.rows.get();
    for (int64_t begin = keys.begin; begin < keys.end; begin += kTileKeys) {
      const int64_t count = std::min<int64_t>(kTileKeys, keys.end - begin);
      const int64_t offset = begin - keys.begin;
      read_rows(v_, part.batch, part.k_head, begin, count, channels_, rows);
      panels_of_rows(rows, count, channels_, panel, scratch.v_columns.get() + offset * channels_);
      read_rows(k_, part.batch, part.k_head, begin, count, channels_, rows);
      panels_of_rows(rows, count, channels_, panel, scratch.k_columns.get() + offset * channels_);
      scratch.k_norms.get()[offset / kTileKeys] =
          call_.slopes.defined() ? largest_norm(rows, count, channels_) : Real(0);
      make_finite(rows, count, channels_);
      std::fill(rows + count * channels_, rows + kTileKeys * channels_, Real(0));
      panels_of_channels(rows, kTileKeys, channels_, panel, part_keys_ * panel, scratch.k_rows.get() + offset * panel);
    }
  }

  /// Adds the gradients of a block of rows and the keys `keys`, which contain those that the block sees.
  void add_block(const RowBlock& block, const Part& part, Range keys, const Scratch& scratch) {
    if (keys.empty() && parts_ > 1) {
      return;  // the parts of the gradient of q are zeros
    }
    const int panel = kernels_.panel;
    Real* dq = scratch.dq.get();
    std::fill(dq, dq + block.rows * wide_channels_, Real(0));
    if (!keys.empty()) {
      GradientRow<Real> gradients[kBlockRows];
      SlopeTerms terms[kBlockRows];
      Real norms[kBlockRows];
      read_row_gradients(block, scratch, gradients);
      Real* q = scratch.rows.get();
      read_rows(q_, block.batch, block.head, block.begin, block.rows, channels_, q);
      for (int i = 0; i < block.rows; ++i) {
        norms[i] = call_.slopes.defined() ? largest_norm(q + i * channels_, 1, channels_) : Real(0);
      }
      panels_of_channels(q, block.rows, channels_, panel, kBlockRows * panel, scratch.q_panels.get());
      const auto scale = static_cast<Real>(call_.scale);
      const int64_t part_begin = keys_of(part).begin;
      for (int64_t offset = (keys.begin - part_begin) / kTileKeys * kTileKeys; part_begin + offset < keys.end;
           offset += kTileKeys) {
        const Real most = std::abs(scale) * scratch.k_norms.get()[offset / kTileKeys];
        int64_t reaches[kBlockRows];
        for (int i = 0; i < block.rows; ++i) {
          reaches[i] = reach(most * norms[i], gradients[i].lse, slopes_.slope(block.batch, block.head));
        }
        const int64_t begin = part_begin + offset;
        const Tile tile(block, begin, std::min<int64_t>(begin + kTileKeys, keys.end), panel, reaches);
        if (!tile.is_empty) {
          add_tile(block, tile, offset, scratch, gradients, terms);
        }
      }
      if (grad_slopes_.defined()) {
        std::copy_n(
            terms, block.rows,
            slope_terms_.begin() + part.index * rows_ + row_index(block.batch, block.head, block.begin));
      }
    }
    for (int i = 0; i < block.rows; ++i) {
      const Real* row = dq + i * wide_channels_;
      const int64_t query = block.begin + i;
      if (parts_ > 1) {
        std::copy_n(
            row, channels_,
            q_parts_.template mutable_data_ptr<Real>() +
                (part.index * rows_ + row_index(block.batch, block.head, query)) * channels_);
      } else {
        write_row(
            row, static_cast<Real>(call_.scale), grad_q_.channel, channels_,
            grad_q_.row(block.batch, query, block.head));
      }
    }
  }

  /// Reads the rows of `grad_out`, and their lse and shifts.
  void read_row_gradients(const RowBlock& block, const Scratch& scratch, GradientRow<Real>* gradients) {
    Real* grad = scratch.grad.get();
    read_rows(grad_out_, block.batch, block.head, block.begin, block.rows, channels_, grad);
    panels_of_channels(
        grad, block.rows, channels_, kernels_.panel, kBlockRows * kernels_.panel, scratch.grad_panels.get());
    read_rows(out_, block.batch, block.head, block.begin, block.rows, channels_, scratch.rows.get());
    const Real slope = slopes_.slope(block.batch, block.head);
    for (int i = 0; i < block.rows; ++i) {
      const int64_t index = row_index(block.batch, block.head, block.begin + i);
      const Real product = dot(grad + i * channels_, scratch.rows.get() + i * channels_, channels_);
      const Real lse = lse_[index] == -std::numeric_limits<Real>::infinity()
          ? Real(0)
          : lse_[index] + nearest_bias(slope, visibility_.distance(block.batch, block.begin + i));
      gradients[i] = {
          scratch.dp.get() + i * kRowStride, lse, grad_lse_ == nullptr ? product : product - grad_lse_[index],
          scratch.factors.get()};
    }
  }

  /// @param offset  keys of the part before the tile.
  void add_tile(
      const RowBlock& block,
      const Tile& tile,
      int64_t offset,
      const Scratch& scratch,
      const GradientRow<Real>* gradients,
      SlopeTerms* terms) {
    const int panel = kernels_.panel;
    const int panels = tile.width / panel;
    const int channel_panels = static_cast<int>(wide_channels_ / panel);
    const auto depth = static_cast<int>(channels_);
    Real* scores = scratch.scores.get();
    Real* dp = scratch.dp.get();
    const Real* k = scratch.k_columns.get() + offset * channels_;
    const Real* v = scratch.v_columns.get() + offset * channels_;
    kernels_.product(
        {scratch.rows.get(), channels_, 1, k, channels_ * panel, scores, kRowStride, block.rows, panels, depth,
         /*accumulate=*/false, tile.limits(), nullptr});
    kernels_.product(
        {scratch.grad.get(), channels_, 1, v, channels_ * panel, dp, kRowStride, block.rows, panels, depth,
         /*accumulate=*/false, tile.limits(), nullptr});
    const auto scale = static_cast<Real>(call_.scale);
    const auto softcap = static_cast<Real>(call_.softcap.value_or(0));
    const Real slope = slopes_.slope(block.batch, block.head);
    for (int i = 0; i < block.rows; ++i) {
      const auto position = static_cast<Real>(tile.nearest[i]);
      const TileRow<Real> row{scores + i * kRowStride, tile.visible[i], tile.width, scale, slope, position, softcap};
      kernels_.gradient_row(row, gradients[i]);
      if (grad_slopes_.defined()) {
        kernels_.slope_terms(row, gradients[i], terms[i]);
      }
      if (call_.softcap.has_value()) {
        kernels_.through_softcap(row, gradients[i]);
      }
    }
    kernels_.product(
        {dp, kRowStride, 1, scratch.k_rows.get() + offset * panel, part_keys_ * panel, scratch.dq.get(), wide_channels_,
         block.rows, channel_panels, tile.width, /*accumulate=*/true, nullptr, tile.limits()});
    Range rows_of_keys[kTileKeys];
    if (!tile.is_dense) {
      tile.rows_of_keys(block.rows, rows_of_keys);
    }
    const auto add_to_keys = [&](const Real* weights, const Real* rows, Real* sums) {
      kernels_.product(
          {weights, 1, kRowStride, rows, kBlockRows * panel, sums + offset * wide_channels_, wide_channels_, tile.width,
           channel_panels, block.rows, /*accumulate=*/true, nullptr, tile.is_dense ? nullptr : rows_of_keys});
    };
    add_to_keys(scores, scratch.grad_panels.get(), scratch.dv.get());
    add_to_keys(dp, scratch.q_panels.get(), scratch.dk.get());
  }

  void sum_parts_of_q() {
    at::parallel_for(0, rows_, std::max<int64_t>(1, kGrainElements / channels_), [&](int64_t begin, int64_t end) {
      std::vector<Real> sums(channels_);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sums.begin(), sums.end(), Real(0));
        for (int64_t part = 0; part < parts_; ++part) {
          const Real* of_part = q_parts_.template const_data_ptr<Real>() + (part * rows_ + row) * channels_;
          for (int64_t c = 0; c < channels_; ++c) {
            sums[c] += of_part[c];
          }
        }
        const int64_t head = row / call_.q_len();
        write_row(
            sums.data(), static_cast<Real>(call_.scale), grad_q_.channel, channels_,
            grad_q_.row(head / call_.q_heads(), row % call_.q_len(), head % call_.q_heads()));
      }
    });
  }

  /// The gradient of the slopes, in float64. In exact arithmetic the sum of dS over a row is the gradient of its lse.
  /// It is not here, because `out` is rounded to the dtype of q. That error times a distance of thousands is larger
  /// than the gradient. Subtracting the mean distance of the row from the distances removes it.
  void sum_slope_terms() {
    const at::Tensor sums = at::empty({call_.batch(), call_.q_heads()}, grad_slopes_.options().dtype(at::kDouble));
    auto* result = sums.mutable_data_ptr<double>();
    for (int64_t b = 0; b < call_.batch(); ++b) {
      for (int64_t head = 0; head < call_.q_heads(); ++head) {
        *result++ = -sum_slope_terms(b, head);
      }
    }
    grad_slopes_.copy_(grad_slopes_.dim() == 1 ? sums.sum(0) : sums);
  }

  double sum_slope_terms(int64_t batch, int64_t head) const {
    double total = 0;
    for (int64_t i = 0; i < call_.q_len(); ++i) {
      const int64_t row = row_index(batch, head, i);
      SlopeTerms terms;
      for (int64_t part = 0; part < parts_; ++part) {
        terms += slope_terms_[part * rows_ + row];
      }
      total += terms.ds_distance - terms.p_distance * terms.ds;
      if (grad_lse_ != nullptr) {
        const bool sees_keys = lse_[row] != -std::numeric_limits<Real>::infinity();
        const auto nearest = static_cast<double>(sees_keys ? visibility_.distance(batch, i) : 0);
        total += static_cast<double>(grad_lse_[row]) * (nearest + terms.p_distance);
      }
    }
    return total;
  }

  const blockwise::Padded& call_;
  HeadRows<const T> q_, k_, v_, grad_out_, out_;
  HeadRows<T> grad_q_, grad_k_, grad_v_;
  at::Tensor grad_slopes_, contiguous_lse_;
  const Real* lse_;  // [B, Hq, Sq]
  at::Tensor contiguous_grad_lse_;
  const Real* grad_lse_;  // null: zero
  Visibility visibility_;
  Slopes<Real> slopes_;
  const TileKernels<Real>& kernels_;
  int64_t channels_, wide_channels_;  // rounded up to panels
  int64_t group_;                     // query heads of a key head
  int64_t part_keys_, parts_, rows_;
  at::Tensor q_parts_;                   // [parts, B, Hq, Sq, D], before the factor `scale`
  std::vector<SlopeTerms> slope_terms_;  // [parts, B, Hq, Sq]
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const blockwise::Padded& call,
    const at::Tensor& grad_out,
    const at::Tensor& grad_lse,
    const at::Tensor& out,
    const at::Tensor& lse,
    bool slopes_grad) {
  const at::Tensor grad_q = at::empty_like(call.q);
  const at::Tensor grad_k = at::empty_like(call.k);
  const at::Tensor grad_v = at::empty_like(call.v);
  const at::Tensor grad_slopes = slopes_grad ? at::zeros(call.slopes.sizes(), lse.options()) : at::Tensor();
  if (call.batch() * call.k_heads() > 0) {
    for_dtype(call.q.scalar_type(), [&](auto type) {
      using T = typename decltype(type)::type;
      Backward<T>(call, grad_out, grad_lse, out, lse, {grad_q, grad_k, grad_v, grad_slopes}).run();
    });
  }
  return {grad_q, grad_k, grad_v, grad_slopes};
}

}  // namespace posenc::cpu
