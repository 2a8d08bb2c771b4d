#pragma once

#include <cpu/detail/attention_tiles.h>
#include <cpu/detail/simd.h>

// Products of few rows with keys or values where they are. As for `attention_tile_kernels.h`, which includes it, no
// function calls one of the standard library.
namespace posenc::cpu {

/// Rows ahead of the row that is read, which are fetched into the first cache. Rows of one head are not adjacent.
constexpr int kRowsAhead = 8;

template <typename Real>
POSENC_ALWAYS_INLINE void fetch(const Real* row, int channels) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(Real));
  for (int c = 0; c < channels; c += kLine) {
    __builtin_prefetch(row + c);
  }
}

/// `multiply_rows` for `kQueries` rows of `a` from `query` on, and `kKeys` rows from `key` on.
template <typename S, int kQueries, int kKeys>
POSENC_ALWAYS_INLINE void multiply_row_block(const RowsProduct<typename S::Scalar>& p, int query, int key) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  const Real* a = p.a + query * p.a_row;
  const Real* rows = p.rows + key * p.row;
  Vector sums[kQueries][kKeys] = {};
  int c = 0;
  for (; c + S::kLanes <= p.channels; c += S::kLanes) {
    Vector x[kQueries];
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      x[i] = S::load(a + i * p.a_row + c);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kKeys; ++j) {
      const Vector y = S::load(rows + j * p.row + c);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        sums[i][j] += x[i] * y;
      }
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    for (int j = 0; j < kKeys; ++j) {
      Real sum = S::sum(sums[i][j]);
      for (int rest = c; rest < p.channels; ++rest) {
        sum += a[i * p.a_row + rest] * rows[j * p.row + rest];
      }
      p.result[(query + i) * p.result_row + key + j] = sum;
    }
  }
}

template <typename S, int kQueries, int kKeys>
POSENC_ALWAYS_INLINE void multiply_rows_of(const RowsProduct<typename S::Scalar>& p, int query) {
  int key = 0;
  for (; key + kKeys <= p.count; key += kKeys) {
    for (int j = key + kRowsAhead; j < key + kRowsAhead + kKeys && j < p.count; ++j) {
      fetch(p.rows + j * p.row, p.channels);
    }
    multiply_row_block<S, kQueries, kKeys>(p, query, key);
  }
  for (; key < p.count; ++key) {
    multiply_row_block<S, kQueries, 1>(p, query, key);
  }
}

template <typename S>
POSENC_ALWAYS_INLINE void multiply_rows(const RowsProduct<typename S::Scalar>& p) {
  int query = 0;
  for (; query + 4 <= p.a_rows; query += 4) {
    multiply_rows_of<S, 4, 2>(p, query);
  }
  for (; query + 2 <= p.a_rows; query += 2) {
    multiply_rows_of<S, 2, 4>(p, query);
  }
  if (query < p.a_rows) {
    multiply_rows_of<S, 1, 4>(p, query);
  }
}

/// `add_rows` for `kQueries` rows of `a` from `query` on, and `kVectors` vectors of channels from `channel` on.
template <typename S, int kQueries, int kVectors>
POSENC_ALWAYS_INLINE void add_row_block(const RowsProduct<typename S::Scalar>& p, int query, int channel) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  const Real* a = p.a + query * p.a_row;
  const Real* row = p.rows + channel;
  Vector sums[kQueries][kVectors] = {};
  for (int key = 0; key < p.count; ++key) {
    if (key + kRowsAhead < p.count) {
      fetch(row + kRowsAhead * p.row, kVectors * S::kLanes);
    }
    Vector x[kQueries];
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i) {
      x[i] = S::all(a[i * p.a_row + key]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const Vector y = S::load(row + j * S::kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        sums[i][j] += x[i] * y;
      }
    }
    row += p.row;
  }
  for (int i = 0; i < kQueries; ++i) {
    Real* result = p.result + (query + i) * p.result_row + channel;
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      S::store(result + j * S::kLanes, S::load(result + j * S::kLanes) + sums[i][j]);
    }
  }
}

template <typename S, int kQueries, int kVectors>
POSENC_ALWAYS_INLINE void add_rows_of(const RowsProduct<typename S::Scalar>& p, int query) {
  using Real = typename S::Scalar;
  int channel = 0;
  for (; channel + kVectors * S::kLanes <= p.channels; channel += kVectors * S::kLanes) {
    add_row_block<S, kQueries, kVectors>(p, query, channel);
  }
  for (; channel + S::kLanes <= p.channels; channel += S::kLanes) {
    add_row_block<S, kQueries, 1>(p, query, channel);
  }
  for (; channel < p.channels; ++channel) {
    for (int i = query; i < query + kQueries; ++i) {
      Real sum = 0;
      for (int key = 0; key < p.count; ++key) {
        sum += p.a[i * p.a_row + key] * p.rows[key * p.row + channel];
      }
      p.result[i * p.result_row + channel] += sum;
    }
  }
}

template <typename S>
POSENC_ALWAYS_INLINE void add_rows(const RowsProduct<typename S::Scalar>& p) {
  int query = 0;
  for (; query + 4 <= p.a_rows; query += 4) {
    add_rows_of<S, 4, 2>(p, query);
  }
  for (; query + 2 <= p.a_rows; query += 2) {
    add_rows_of<S, 2, 4>(p, query);
  }
  if (query < p.a_rows) {
    add_rows_of<S, 1, 8>(p, query);
  }
}

}  // namespace posenc::cpu
