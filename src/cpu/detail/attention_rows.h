#pragma once

#include <cpu/detail/attention_tiles.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/lanes.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

// Rows of the tensors of attention in packed buffers, whose panels `Product` reads.
namespace posenc::cpu {

/// Uninitialised memory, aligned to a cache line.
template <typename Real>
class Buffer {
 public:
  explicit Buffer(int64_t elements) {
    const std::size_t bytes = elements * sizeof(Real);
    std::size_t space = bytes + kAlignment;
    memory_.reset(new char[space]);  // make_unique would fill it with zeros
    void* address = memory_.get();
    data_ = static_cast<Real*>(std::align(kAlignment, bytes, address, space));
  }

  Real* get() const { return data_; }

 private:
  static constexpr std::size_t kAlignment = 64;
  std::unique_ptr<char[]> memory_;
  Real* data_;
};

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
  constexpr int kLanes = 32;  // as in score_rows.h
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

/// `sums += factor * row`
template <typename Real>
POSENC_CPU_CLONES void add_multiple(Real factor, const Real* row, int64_t channels, Real* __restrict sums) {
  for (int64_t c = 0; c < channels; ++c) {
    sums[c] += factor * row[c];
  }
}

/// The largest Euclidean norm of rows `[count, channels]`; infinity if there is a NaN.
template <typename Real>
Real largest_norm(const Real* rows, int64_t count, int64_t channels) {
  Real largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Real square = dot(rows + i * channels, rows + i * channels, channels);
    largest = square <= largest ? largest : square;
    if (std::isnan(square)) {
      return std::numeric_limits<Real>::infinity();
    }
  }
  return std::sqrt(largest);
}

/// Whether a number is neither NaN nor infinite, in instructions that the compiler vectorises.
template <typename Real>
bool is_finite(Real x) {
  return std::abs(x) <= std::numeric_limits<Real>::max();
}

/// Whether a row has no NaN and no infinity.
template <typename Real>
POSENC_CPU_CLONES bool is_finite(const Real* row, int64_t channels) {
  int64_t others = 0;
  for (int64_t c = 0; c < channels; ++c) {
    others += is_finite(row[c]) ? 0 : 1;
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
      std::replace_if(row, row + channels, [](Real x) { return !is_finite(x); }, Real(0));
      changed = true;
    }
  }
  return changed;
}

/// Adds the elements of rows `visible` of a head that are NaN or infinite to `sums`, `[channels]`.
template <typename T, typename Real>
void add_not_finite(const HeadRows<T>& x, int64_t batch, int64_t head, Range visible, int64_t channels, Real* sums) {
  for (int64_t i = visible.begin; i < visible.end; ++i) {
    const T* row = x.row(batch, i, head);
    for (int64_t c = 0; c < channels; ++c) {
      const auto value = static_cast<Real>(row[c * x.channel]);
      sums[c] += is_finite(value) ? Real(0) : value;
    }
  }
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

}  // namespace posenc::cpu
