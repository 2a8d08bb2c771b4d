#pragma once

#include <cstdint>

// Arithmetic of attention on one tile: some query rows and some keys, in packed buffers that fit the caches. It is
// compiled for several instruction sets, of which one is chosen at run time.
namespace posenc::cpu {

/// Indices `begin` to `end - 1`; empty if `end <= begin`.
struct Range {
  int32_t begin, end;

  bool empty() const { return end <= begin; }
};

/// Most rows of `a` in one product.
constexpr int kMaxProductRows = 256;

/// `c = a b` or `c += a b`. `b` and `c` are divided into panels of `TileKernels::panel` columns; a panel of `b` is
/// `[depth, panel]`, dense.
template <typename Real>
struct Product {
  const Real* a;  // element (row, k) is at `row * a_row + k * a_depth`; one of these strides is 1
  int64_t a_row, a_depth;
  const Real* b;
  int64_t b_panel;  // elements from a panel of `b` to the next
  Real* c;
  int64_t c_row;
  int rows, panels, depth;
  bool accumulate;
  const Range* columns;  // for each row, the columns that are read later; null: all
  const Range* depths;   // for each row, the range of k in which `a` is not zero; null: all
};

/// A product of few rows `a` with keys or values where they are, which are not in panels.
template <typename Real>
struct RowsProduct {
  const Real* a;  // queries `[a_rows, channels]` or scores `[a_rows, count]`
  int64_t a_row;
  int a_rows;
  const Real* rows;  // keys or values, `[count, channels]`
  int64_t row;
  int count, channels;
  Real* result;  // scores `[a_rows, count]` or sums `[a_rows, channels]`
  int64_t result_row;
};

/// A row of scores of one tile.
template <typename Real>
struct TileRow {
  Real* scores;   // `q . k` of `width` keys
  Range visible;  // the keys of the tile that the row sees
  int width;      // a multiple of the panel
  Real scale;
  Real slope;
  Real position;     // to which distances are relative, in keys from the first key of the tile
  Real softcap = 0;  // 0: none
};

/// Running results of a row in the online softmax.
template <typename Real>
struct SoftmaxRow {
  Real maximum, sum;
  Real* out;     // sums of `exp(score - maximum) * value`
  int channels;  // a multiple of the panel
};

/// Values of a row in the backward pass.
template <typename Real>
struct GradientRow {
  Real* dp;  // `grad_out . v` of `width` keys
  Real lse;
  Real shift;     // `rowsum(grad_out * out) - grad_lse`
  Real* factors;  // derivatives of softcap by the scaled scores of `width` keys; not used without softcap
};

/// Sums over the keys of a row, from which the gradient of its slope is computed.
struct SlopeTerms {
  double ds = 0;           // sum of dS
  double ds_distance = 0;  // sum of dS * distance
  double p_distance = 0;   // sum of P * distance

  void operator+=(const SlopeTerms& other) {
    ds += other.ds;
    ds_distance += other.ds_distance;
    p_distance += other.p_distance;
  }
};

template <typename Real>
struct TileKernels {
  int panel;

  /// Replaces `count` numbers by `exp(x - shift)`, and returns their sum. Also for `alibi_softmax`.
  Real (*exponentials)(Real* x, Real shift, int count);

  void (*product)(const Product<Real>&);

  /// Writes the scores of keys, `a rows^T`.
  void (*multiply_rows)(const RowsProduct<Real>&);

  /// Adds values multiplied by scores, `a rows`, to the sums.
  void (*add_rows)(const RowsProduct<Real>&);

  /// Replaces scores by `exp(softcap(scale * score) - slope * distance - maximum)`, 0 for hidden keys. Updates the
  /// running results to a new maximum and multiplies `out` accordingly.
  void (*softmax_row)(const TileRow<Real>&, SoftmaxRow<Real>&);

  /// Replaces scores by the probabilities P, and `dp` by the gradients of the logits, `dS = P (dP - shift)`; both are 0
  /// for hidden keys. Writes `factors`.
  void (*gradient_row)(const TileRow<Real>&, const GradientRow<Real>&);

  /// Adds the terms of the gradient of the slope, after `gradient_row`.
  void (*slope_terms)(const TileRow<Real>&, const GradientRow<Real>&, SlopeTerms&);

  /// Multiplies the gradients of the logits, `dp`, by `factors`: the gradients of the scaled scores.
  void (*through_softcap)(const TileRow<Real>&, const GradientRow<Real>&);
};

// The kernels for float and double, compiled for one instruction set each. The argument selects float or double by its
// type; its value is not read.
const TileKernels<float>& portable_tile_kernels(float);
const TileKernels<double>& portable_tile_kernels(double);
const TileKernels<float>& avx2_tile_kernels(float);
const TileKernels<double>& avx2_tile_kernels(double);
const TileKernels<float>& avx512_tile_kernels(float);
const TileKernels<double>& avx512_tile_kernels(double);

/// Whether this machine has these instruction sets; defined for x86-64.
bool has_avx2();
bool has_avx512();

/// The kernels for the instruction set of this machine; `Real` is float or double.
template <typename Real>
const TileKernels<Real>& tile_kernels();

}  // namespace posenc::cpu
