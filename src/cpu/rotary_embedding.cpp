#include <arguments/rotary_embedding.h>
#include <arguments/rotary_embedding_qkv.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/lanes.h>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

namespace posenc {
namespace {

using cpu::arithmetic_t;

/// The heads of one token in one tensor.
template <typename T>
struct TokenHeads {
  const T* in;
  T* out;
  int64_t num_heads, head_dim, num_pairs;
  Strides in_strides, out_strides;
};

/// One row of each table; `sign` is -1 to rotate backwards.
template <typename Real>
struct TokenTables {
  const Real* cos;
  const Real* sin;
  int64_t cos_stride, sin_stride;
  Real sign;
};

/// Rotates all heads of one token. The channel stride of the input is `InStride`, and all others are 1; or, where
/// `InStride` is -1, all are whatever they are.
template <typename T, bool Interleaved, int InStride>
POSENC_CPU_CLONES void rotate_token(const TokenHeads<T>& heads, const TokenTables<arithmetic_t<T>>& tables) {
  using Real = arithmetic_t<T>;
  constexpr bool kAny = InStride < 0;
  const int64_t in_stride = kAny ? heads.in_strides.channel : InStride;
  const int64_t out_stride = kAny ? heads.out_strides.channel : 1;
  const int64_t cos_stride = kAny ? tables.cos_stride : 1;
  const int64_t sin_stride = kAny ? tables.sin_stride : 1;
  const int64_t pairs = heads.num_pairs;
  const Real* cos = tables.cos;
  const Real* sin = tables.sin;
  const Real sign = tables.sign;
  for (int64_t h = 0; h < heads.num_heads; ++h) {
    const T* in = heads.in + h * heads.in_strides.head;
    T* out = heads.out + h * heads.out_strides.head;
    POSENC_INDEPENDENT
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t first = Interleaved ? 2 * i : i;
      const int64_t second = Interleaved ? 2 * i + 1 : i + pairs;
      const Real x1 = static_cast<Real>(in[first * in_stride]);
      const Real x2 = static_cast<Real>(in[second * in_stride]);
      const Real c = cos[i * cos_stride];
      const Real s = sign * sin[i * sin_stride];
      out[first * out_stride] = static_cast<T>(x1 * c - x2 * s);
      out[second * out_stride] = static_cast<T>(x1 * s + x2 * c);
    }
    for (int64_t i = 2 * pairs; i < heads.head_dim; ++i) {
      out[i * out_stride] = in[i * in_stride];
    }
  }
}

template <typename T>
void fill_nan(const TokenHeads<T>& heads) {
  for (int64_t h = 0; h < heads.num_heads; ++h) {
    T* out = heads.out + h * heads.out_strides.head;
    for (int64_t i = 0; i < heads.head_dim; ++i) {
      out[i * heads.out_strides.channel] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

template <typename T>
void copy_token(const TokenHeads<T>& heads) {
  for (int64_t h = 0; h < heads.num_heads; ++h) {
    const T* in = heads.in + h * heads.in_strides.head;
    T* out = heads.out + h * heads.out_strides.head;
    for (int64_t i = 0; i < heads.head_dim; ++i) {
      out[i * heads.out_strides.channel] = in[i * heads.in_strides.channel];
    }
  }
}

template <typename T>
void rotate_token(const TokenHeads<T>& heads, const TokenTables<arithmetic_t<T>>& tables, bool interleaved) {
  const bool dense = heads.out_strides.channel == 1 && tables.cos_stride == 1 && tables.sin_stride == 1;
  const int64_t in_stride = dense ? heads.in_strides.channel : -1;
  const auto rotate = in_stride == 1 ? (interleaved ? rotate_token<T, true, 1> : rotate_token<T, false, 1>)
      : in_stride == 0               ? (interleaved ? rotate_token<T, true, 0> : rotate_token<T, false, 0>)
                                     : (interleaved ? rotate_token<T, true, -1> : rotate_token<T, false, -1>);
  rotate(heads, tables);
}

int64_t position_at(const PositionsView& positions, int64_t axis, int64_t batch, int64_t seq) {
  const int64_t index = axis * positions.stride_axis + batch * positions.stride_batch + seq * positions.stride_seq;
  return positions.is_int64 ? static_cast<const int64_t*>(positions.data)[index]
                            : static_cast<const int32_t*>(positions.data)[index];
}

/// The rows that one token reads by several axes, put together pair by pair. A pair whose position is outside the
/// tables has a sine of NaN, and so becomes NaN.
template <typename Real>
class GatheredTables {
 public:
  explicit GatheredTables(const RotaryProblem& problem)
      : problem_(problem), cos_(static_cast<size_t>(problem.num_pairs)), sin_(static_cast<size_t>(problem.num_pairs)) {}

  TokenTables<Real> of_token(int64_t batch, int64_t seq) {
    std::array<int64_t, kMaxAxes> rows{};
    for (int32_t axis = 0; axis < problem_.positions.num_axes; ++axis) {
      const int64_t position = position_at(problem_.positions, axis, batch, seq);
      rows[axis] = position >= 0 && position < problem_.table_rows ? position : kNoRow;
    }
    const auto* cos = static_cast<const Real*>(problem_.cos.data);
    const auto* sin = static_cast<const Real*>(problem_.sin.data);
    for (int64_t i = 0; i < problem_.num_pairs; ++i) {
      const int64_t row = rows[problem_.pair_axes.axis(i)];
      constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();
      cos_[i] = row == kNoRow ? kNan : cos[row * problem_.cos.stride_row + i * problem_.cos.stride_pair];
      sin_[i] = row == kNoRow ? kNan : sin[row * problem_.sin.stride_row + i * problem_.sin.stride_pair];
    }
    return {cos_.data(), sin_.data(), 1, 1, problem_.conjugate ? Real(-1) : Real(1)};
  }

 private:
  static constexpr int64_t kNoRow = -1;

  const RotaryProblem& problem_;
  std::vector<Real> cos_, sin_;
};

template <typename T>
void run_typed(const RotaryProblem& problem) {
  using Real = arithmetic_t<T>;
  const int64_t num_heads = problem.num_heads();
  const int64_t grain = std::max<int64_t>(1, cpu::kGrainElements / std::max<int64_t>(1, num_heads * problem.head_dim));
  const bool has_axes = problem.positions.num_axes > 0;
  at::parallel_for(0, problem.batch * problem.seq_len, grain, [&](int64_t begin, int64_t end) {
    std::optional<GatheredTables<Real>> gathered;
    if (has_axes) {
      gathered.emplace(problem);
    }
    for (int64_t token = begin; token < end; ++token) {
      const int64_t batch = token / problem.seq_len;
      const int64_t seq = token % problem.seq_len;
      const bool looked_up = problem.positions.data != nullptr;
      const int64_t position = has_axes ? 0 : looked_up ? position_at(problem.positions, 0, batch, seq) : seq;
      const bool exists = has_axes || (position >= 0 && position < problem.table_rows);
      const int64_t row = exists ? position : 0;
      const auto row_of = [&](const RotaryTable& table) {
        const int64_t of_batch = looked_up ? 0 : batch * table.stride_batch;
        return static_cast<const Real*>(table.data) + of_batch + row * table.stride_row;
      };
      const TokenTables<Real> tables = has_axes ? gathered->of_token(batch, seq)
                                                : TokenTables<Real>{
                                                      row_of(problem.cos), row_of(problem.sin), problem.cos.stride_pair,
                                                      problem.sin.stride_pair, problem.conjugate ? Real(-1) : Real(1)};
      for (int32_t i = 0; i < problem.num_operands; ++i) {
        const RotaryProblem::Operand& operand = problem.operands[i];
        const auto offset = [&](const Strides& strides) { return batch * strides.batch + seq * strides.seq; };
        const TokenHeads<T> heads{
            static_cast<const T*>(operand.in) + offset(operand.in_strides),
            static_cast<T*>(operand.out) + offset(operand.out_strides),
            operand.num_heads,
            problem.head_dim,
            problem.num_pairs,
            operand.in_strides,
            operand.out_strides};
        if (operand.copied) {
          copy_token(heads);
        } else if (exists) {
          rotate_token(heads, tables, problem.interleaved);
        } else {
          fill_nan(heads);
        }
      }
    }
  });
}

void rotate(const RotaryProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run_typed<typename decltype(type)::type>(problem); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("rotary_embedding", rotary_kernel<arguments::rotary_embedding<rotate>>);
  m.impl("rotary_embedding_", rotary_kernel<arguments::rotary_embedding_in_place<rotate>>);
  m.impl("rotary_embedding_qk", rotary_kernel<arguments::rotary_embedding_qk<rotate>>);
  m.impl("rotary_embedding_qk_", rotary_kernel<arguments::rotary_embedding_qk_in_place<rotate>>);
  m.impl("rotary_embedding_qkv", rotary_kernel<arguments::rotary_embedding_qkv<rotate>>);
  m.impl("rotary_embedding_pack", rotary_pack_kernel<arguments::rotary_embedding_pack<rotate>>);
}

}  // namespace posenc
