#pragma once

#include <cpu/detail/attention_row_kernels.h>
#include <cpu/detail/attention_tiles.h>
#include <cpu/detail/exp.h>
#include <cpu/detail/simd.h>

#include <limits>
#include <type_traits>

// The functions of `TileKernels`, for sources that are compiled for one instruction set each. They call no inline
// function of the standard library that another source could call too: the linker keeps one copy of such a function,
// which may have instructions that the machine lacks.
namespace posenc::cpu {

template <typename T>
POSENC_ALWAYS_INLINE T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
POSENC_ALWAYS_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

template <typename Real>
POSENC_ALWAYS_INLINE void fill(Real* begin, const Real* end, Real value) {
  for (; begin != end; ++begin) {
    *begin = value;
  }
}

/// One block of a product: `kRows` rows and one panel, which is two vectors wide. The sums are in registers.
template <typename S, int kRows, bool kTransposed>
POSENC_ALWAYS_INLINE void product_block(const Product<typename S::Scalar>& p, int row, int panel, Range depths) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  constexpr int kPanel = 2 * S::kLanes;
  const int64_t row_step = kTransposed ? 1 : p.a_row;
  const int64_t depth_step = kTransposed ? p.a_depth : 1;
  const Real* a = p.a + row * row_step + depths.begin * depth_step;
  const Real* b = p.b + panel * p.b_panel + static_cast<int64_t>(depths.begin) * kPanel;
  Vector sums[kRows][2] = {};
  for (int32_t k = depths.begin; k < depths.end; ++k) {
    const Vector left = S::load(b);
    const Vector right = S::load(b + S::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vector x = S::all(a[i * row_step]);
      sums[i][0] += x * left;
      sums[i][1] += x * right;
    }
    a += depth_step;
    b += kPanel;
  }
  Real* c = p.c + row * p.c_row + static_cast<int64_t>(panel) * kPanel;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (p.accumulate) {
      sums[i][0] += S::load(c);
      sums[i][1] += S::load(c + S::kLanes);
    }
    S::store(c, sums[i][0]);
    S::store(c + S::kLanes, sums[i][1]);
    c += p.c_row;
  }
}

/// `product_block` for `rows <= kRows` rows.
template <typename S, int kRows, bool kTransposed>
POSENC_ALWAYS_INLINE void product_rows(
    const Product<typename S::Scalar>& p,
    int row,
    int rows,
    int panel,
    Range depths) {
  if (rows == kRows) {
    product_block<S, kRows, kTransposed>(p, row, panel, depths);
  } else if constexpr (kRows > 1) {
    product_rows<S, kRows - 1, kTransposed>(p, row, rows, panel, depths);
  }
}

/// The smallest range that contains those of all rows.
POSENC_ALWAYS_INLINE Range union_of(const Range* ranges, int rows) {
  Range result{std::numeric_limits<int32_t>::max(), 0};
  for (int i = 0; i < rows; ++i) {
    if (!ranges[i].empty()) {
      result.begin = min(result.begin, ranges[i].begin);
      result.end = max(result.end, ranges[i].end);
    }
  }
  return result;
}

template <typename S, int kRows, bool kTransposed>
POSENC_ALWAYS_INLINE void product_of(const Product<typename S::Scalar>& p) {
  constexpr int kPanel = 2 * S::kLanes;
  constexpr int kGroups = (kMaxProductRows + kRows - 1) / kRows;
  Range columns[kGroups], depths[kGroups];
  for (int row = 0, group = 0; row < p.rows; row += kRows, ++group) {
    const int rows = min(kRows, p.rows - row);
    columns[group] = p.columns == nullptr ? Range{0, p.panels * kPanel} : union_of(p.columns + row, rows);
    depths[group] = p.depths == nullptr ? Range{0, p.depth} : union_of(p.depths + row, rows);
  }
  for (int panel = 0; panel < p.panels; ++panel) {
    for (int row = 0, group = 0; row < p.rows; row += kRows, ++group) {
      if (columns[group].begin < (panel + 1) * kPanel && columns[group].end > panel * kPanel) {
        product_rows<S, kRows, kTransposed>(p, row, min(kRows, p.rows - row), panel, depths[group]);
      }
    }
  }
}

template <typename S, int kRows>
POSENC_ALWAYS_INLINE void product(const Product<typename S::Scalar>& p) {
  if (p.a_depth == 1) {
    product_of<S, kRows, false>(p);
  } else {
    product_of<S, kRows, true>(p);
  }
}

/// The visible keys of a row, rounded outwards to whole vectors.
template <typename S>
POSENC_ALWAYS_INLINE Range whole_vectors(Range visible) {
  constexpr int kLanes = S::kLanes;
  return {visible.begin / kLanes * kLanes, (visible.end + kLanes - 1) / kLanes * kLanes};
}

/// Sets the values of hidden keys within `whole`.
template <typename Real>
POSENC_ALWAYS_INLINE void fill_hidden(Range whole, Range visible, Real* values, Real hidden) {
  fill(values + whole.begin, values + visible.begin, hidden);
  fill(values + visible.end, values + whole.end, hidden);
}

template <typename Real>
POSENC_ALWAYS_INLINE void zero_outside(Range whole, Real* values, int width) {
  fill(values, values + whole.begin, Real(0));
  fill(values + whole.end, values + width, Real(0));
}

/// The scaled scores with the bias.
/// @param offsets  of the keys from the position of the query
template <typename S, bool kCapped>
POSENC_ALWAYS_INLINE typename S::Vector logits(
    const TileRow<typename S::Scalar>& row,
    const typename S::Vector& scores,
    const typename S::Vector& offsets) {
  if constexpr (kCapped) {
    return hyperbolic_tangent<S>(scores * (row.scale / row.softcap)) * row.softcap - S::abs(offsets) * row.slope;
  } else {
    return scores * row.scale - S::abs(offsets) * row.slope;
  }
}

/// The offsets of keys `j` to `j + kLanes - 1` from the position of the query.
template <typename S>
POSENC_ALWAYS_INLINE typename S::Vector offsets_at(int j, typename S::Scalar position) {
  return S::iota() + (static_cast<typename S::Scalar>(j) - position);
}

template <typename S, bool kCapped>
POSENC_ALWAYS_INLINE void softmax_row(const TileRow<typename S::Scalar> row, SoftmaxRow<typename S::Scalar>& state) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  constexpr Real kHidden = -std::numeric_limits<Real>::infinity();
  if (row.visible.empty()) {
    fill(row.scores, row.scores + row.width, Real(0));
    return;
  }
  const Range whole = whole_vectors<S>(row.visible);
  Vector highest = S::all(kHidden);
  Vector offsets = offsets_at<S>(whole.begin, row.position);
  for (int j = whole.begin; j < whole.end; j += S::kLanes) {
    const Vector x = logits<S, kCapped>(row, S::load(row.scores + j), offsets);
    offsets += Real(S::kLanes);
    S::store(row.scores + j, x);
    highest = x > highest ? x : highest;
  }
  if (whole.begin != row.visible.begin || whole.end != row.visible.end) {
    fill_hidden(whole, row.visible, row.scores, kHidden);
    highest = S::all(kHidden);
    for (int j = whole.begin; j < whole.end; j += S::kLanes) {
      const Vector x = S::load(row.scores + j);
      highest = x > highest ? x : highest;
    }
  }
  const Real maximum = max(state.maximum, S::max(highest));
  const Real shift = maximum == kHidden ? Real(0) : maximum;
  Vector sums[2] = {};
  int j = whole.begin;
  for (; j + 2 * S::kLanes <= whole.end; j += 2 * S::kLanes) {
    const Vector left = exponential<S>(S::load(row.scores + j) - shift);
    const Vector right = exponential<S>(S::load(row.scores + j + S::kLanes) - shift);
    S::store(row.scores + j, left);
    S::store(row.scores + j + S::kLanes, right);
    sums[0] += left;
    sums[1] += right;
  }
  if (j < whole.end) {
    const Vector x = exponential<S>(S::load(row.scores + j) - shift);
    S::store(row.scores + j, x);
    sums[0] += x;
  }
  zero_outside(whole, row.scores, row.width);
  const Real sum = S::sum(sums[0] + sums[1]);
  if (maximum == state.maximum) {
    state.sum += sum;
    return;
  }
  const Real factor = exponential<S>(S::all(state.maximum - shift))[0];
  state.maximum = maximum;
  state.sum = state.sum * factor + sum;
  for (int c = 0; c < state.channels; c += S::kLanes) {
    S::store(state.out + c, S::load(state.out + c) * factor);
  }
}

template <typename S>
POSENC_ALWAYS_INLINE typename S::Scalar exponentials(typename S::Scalar* x, typename S::Scalar shift, int count) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  constexpr int kVectors = 4;
  constexpr int kStep = kVectors * S::kLanes;
  Vector sums[kVectors] = {};
  int j = 0;
  for (; j + kStep <= count; j += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const Vector y = exponential<S>(S::load(x + j + i * S::kLanes) - shift);
      S::store(x + j + i * S::kLanes, y);
      sums[i] += y;
    }
  }
  for (; j < count; j += S::kLanes) {
    Real rest[S::kLanes];
    const int size = min(S::kLanes, count - j);
    for (int i = 0; i < S::kLanes; ++i) {
      rest[i] = i < size ? x[j + i] - shift : -std::numeric_limits<Real>::infinity();
    }
    const Vector y = exponential<S>(S::load(rest));
    for (int i = 0; i < size; ++i) {
      x[j + i] = y[i];
    }
    sums[0] += y;
  }
  return S::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename S, bool kCapped>
POSENC_ALWAYS_INLINE void gradient_row(
    const TileRow<typename S::Scalar> row,
    const GradientRow<typename S::Scalar> gradient) {
  using Real = typename S::Scalar;
  using Vector = typename S::Vector;
  if (row.visible.empty()) {
    fill(row.scores, row.scores + row.width, Real(0));
    fill(gradient.dp, gradient.dp + row.width, Real(0));
    return;
  }
  const Range whole = whole_vectors<S>(row.visible);
  Vector offsets = offsets_at<S>(whole.begin, row.position);
  for (int j = whole.begin; j < whole.end; j += S::kLanes) {
    const Vector scores = S::load(row.scores + j);
    const Vector p = exponential<S>(logits<S, kCapped>(row, scores, offsets) - gradient.lse);
    if constexpr (kCapped) {
      const Vector tanh = hyperbolic_tangent<S>(scores * (row.scale / row.softcap));
      S::store(gradient.factors + j, (Real(1) - tanh) * (Real(1) + tanh));
    }
    offsets += Real(S::kLanes);
    S::store(row.scores + j, p);
    S::store(gradient.dp + j, p * (S::load(gradient.dp + j) - gradient.shift));
  }
  fill_hidden(whole, row.visible, row.scores, Real(0));
  fill_hidden(whole, row.visible, gradient.dp, Real(0));
  if constexpr (kCapped) {
    fill_hidden(whole, row.visible, gradient.factors, Real(0));
  }
  zero_outside(whole, row.scores, row.width);
  zero_outside(whole, gradient.dp, row.width);
}

template <typename S>
POSENC_ALWAYS_INLINE void slope_terms(
    const TileRow<typename S::Scalar> row,
    const GradientRow<typename S::Scalar> gradient,
    SlopeTerms& terms) {
  using Wide = Simd<double, S::kLanes* static_cast<int>(sizeof(typename S::Scalar))>;  // half as many lanes of float
  using Part = Simd<typename S::Scalar, Wide::kLanes* static_cast<int>(sizeof(typename S::Scalar))>;
  using Vector = typename Wide::Vector;
  if (row.visible.empty()) {
    return;
  }
  Vector ds{};
  Vector ds_distance{};
  Vector p_distance{};
  const int begin = row.visible.begin / Wide::kLanes * Wide::kLanes;
  for (int j = begin; j < row.visible.end; j += Wide::kLanes) {
    const Vector distance = Wide::abs(Wide::iota() + (j - static_cast<double>(row.position)));
    const Vector p = __builtin_convertvector(Part::load(row.scores + j), Vector);
    const Vector gradients = __builtin_convertvector(Part::load(gradient.dp + j), Vector);
    ds += gradients;
    ds_distance += gradients * distance;
    p_distance += p * distance;
  }
  terms.ds += Wide::sum(ds);
  terms.ds_distance += Wide::sum(ds_distance);
  terms.p_distance += Wide::sum(p_distance);
}

template <typename S>
POSENC_ALWAYS_INLINE void through_softcap(
    const TileRow<typename S::Scalar> row,
    const GradientRow<typename S::Scalar> gradient) {
  const Range whole = whole_vectors<S>(row.visible);
  for (int j = whole.begin; j < whole.end; j += S::kLanes) {
    S::store(gradient.dp + j, S::load(gradient.dp + j) * S::load(gradient.factors + j));
  }
}

/// The kernels with vectors of `kBytes` bytes. The sums of `product_block` take two registers for each of `kRows` rows.
template <typename Real, int kBytes, int kRows>
struct TileKernelsOf {
  using S = Simd<Real, kBytes>;

  static Real run_exponentials(Real* x, Real shift, int count) { return exponentials<S>(x, shift, count); }
  static void run_product(const Product<Real>& p) { product<S, kRows>(p); }
  static void run_multiply_rows(const RowsProduct<Real>& p) { multiply_rows<S>(p); }
  static void run_add_rows(const RowsProduct<Real>& p) { add_rows<S>(p); }
  static void run_softmax_row(const TileRow<Real>& row, SoftmaxRow<Real>& state) {
    row.softcap == 0 ? softmax_row<S, false>(row, state) : softmax_row<S, true>(row, state);
  }
  static void run_gradient_row(const TileRow<Real>& row, const GradientRow<Real>& gradient) {
    row.softcap == 0 ? gradient_row<S, false>(row, gradient) : gradient_row<S, true>(row, gradient);
  }
  static void run_slope_terms(const TileRow<Real>& row, const GradientRow<Real>& gradient, SlopeTerms& terms) {
    slope_terms<S>(row, gradient, terms);
  }
  static void run_through_softcap(const TileRow<Real>& row, const GradientRow<Real>& gradient) {
    through_softcap<S>(row, gradient);
  }

  static constexpr TileKernels<Real> kernels{2 * S::kLanes,     run_exponentials, run_product,
                                             run_multiply_rows, run_add_rows,     run_softmax_row,
                                             run_gradient_row,  run_slope_terms,  run_through_softcap};
};

}  // namespace posenc::cpu
