#pragma once

#include <arguments/rotary_problem.h>

#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

// One token of a rotation: its heads and its rows of the tables.
namespace posenc::cpu {

/// The heads of one token in one tensor. `T` is const for inputs.
template <typename T>
struct TokenHeads {
  T* data;
  Strides strides;

  template <typename Void>
  TokenHeads(Void* base, const Strides& of_tensor, int64_t batch, int64_t seq)
      : data(static_cast<T*>(base) + batch * of_tensor.batch + seq * of_tensor.seq), strides(of_tensor) {}

  T* head(int64_t h) const { return data + h * strides.head; }
};

/// The entries of `cos` and `sin` for the pairs of a token.
template <typename Real>
struct TokenRow {
  const Real* cos;
  const Real* sin;
  int64_t cos_stride, sin_stride;
  Real sign;  // factor of sin: -1 for the conjugate rotation
};

/// Finds the row of `cos` and `sin` for each token.
template <typename Real>
class TokenTables {
 public:
  explicit TokenTables(const RotaryProblem& problem) : problem_(problem) {
    if (problem.positions.num_axes > 0) {
      cos_.resize(static_cast<size_t>(problem.num_pairs));
      sin_.resize(static_cast<size_t>(problem.num_pairs));
    }
  }

  /// The entries for token (batch, seq), valid until the next call; nullopt if its position is outside the tables. With
  /// several axes the entries are gathered pair by pair, and are NaN for axes whose position is outside the tables.
  std::optional<TokenRow<Real>> row(int64_t batch, int64_t seq) {
    const PositionsView& positions = problem_.positions;
    if (positions.data == nullptr) {
      return row_at(batch, seq);
    }
    if (positions.num_axes > 0) {
      return gathered_row(batch, seq);
    }
    const int64_t position = row_number(0, batch, seq);
    return position == kNoRow ? std::nullopt : std::optional(row_at(/*batch=*/0, position));
  }

 private:
  static constexpr int64_t kNoRow = -1;

  int64_t row_number(int64_t axis, int64_t batch, int64_t seq) const {
    const PositionsView& positions = problem_.positions;
    const int64_t index = axis * positions.stride_axis + batch * positions.stride_batch + seq * positions.stride_seq;
    const int64_t position = positions.is_int64 ? static_cast<const int64_t*>(positions.data)[index]
                                                : static_cast<const int32_t*>(positions.data)[index];
    return position >= 0 && position < problem_.table_rows ? position : kNoRow;
  }

  Real sign() const { return problem_.conjugate ? Real(-1) : Real(1); }

  TokenRow<Real> row_at(int64_t batch, int64_t row) const {
    const auto entries = [&](const RotaryTable& table) {
      return static_cast<const Real*>(table.data) + batch * table.stride_batch + row * table.stride_row;
    };
    return {entries(problem_.cos), entries(problem_.sin), problem_.cos.stride_pair, problem_.sin.stride_pair, sign()};
  }

  TokenRow<Real> gathered_row(int64_t batch, int64_t seq) {
    std::array<int64_t, kMaxAxes> rows{};
    for (int32_t axis = 0; axis < problem_.positions.num_axes; ++axis) {
      rows[axis] = row_number(axis, batch, seq);
    }
    const auto entry = [](const RotaryTable& table, int64_t row, int64_t pair) {
      return row == kNoRow ? std::numeric_limits<Real>::quiet_NaN()
                           : static_cast<const Real*>(table.data)[row * table.stride_row + pair * table.stride_pair];
    };
    for (int64_t pair = 0; pair < problem_.num_pairs; ++pair) {
      const int64_t row = rows[problem_.pair_axes.axis(pair)];
      cos_[pair] = entry(problem_.cos, row, pair);
      sin_[pair] = entry(problem_.sin, row, pair);
    }
    return {cos_.data(), sin_.data(), 1, 1, sign()};
  }

  const RotaryProblem& problem_;
  std::vector<Real> cos_, sin_;  // gathered entries of the last token, with several axes
};

}  // namespace posenc::cpu
