#include <arguments/qk_norm_rotary_embedding.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/lanes.h>
#include <cpu/detail/rotary_token.h>
#include <ops/dispatch.h>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

// A head is converted to the arithmetic type in a dense buffer, processed there, and converted back when it is stored.
// All combinations of strides and dtypes therefore use the same vectorised loops.
namespace posenc {
namespace {

using cpu::arithmetic_t;
using cpu::TokenHeads;

/// The number of partial sums of a reduction, whose order is the same for all instruction sets.
constexpr int kSumLanes = 16;

/// The tokens are divided into at most this many parts, each with its own sums for the gradients of the weights. The
/// number does not depend on the number of threads, so neither do the gradients.
constexpr int64_t kMaxParts = 256;

/// The parameters of all heads of one token in one tensor. `sin` has the sign of the rotation.
template <typename Real>
struct HeadParameters {
  const Real* cos;
  const Real* sin;
  const Real* weight;
  int64_t num_heads, head_dim, num_pairs;
  Real eps;
};

template <typename T>
inline void read_head(const T* in, int64_t stride, int64_t count, arithmetic_t<T>* out) {
  using Real = arithmetic_t<T>;
  if (stride == 1) {
    POSENC_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<Real>(in[i]);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<Real>(in[i * stride]);
  }
}

template <typename T>
inline void write_head(const arithmetic_t<T>* in, int64_t count, T* out, int64_t stride) {
  if (stride == 1) {
    POSENC_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      out[i] = static_cast<T>(in[i]);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    out[i * stride] = static_cast<T>(in[i]);
  }
}

template <bool Interleaved, typename Real>
inline void rotate_head(Real* x, const Real* cos, const Real* sin, int64_t pairs) {
  POSENC_INDEPENDENT
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t first = Interleaved ? 2 * i : i;
    const int64_t second = Interleaved ? 2 * i + 1 : i + pairs;
    const Real x1 = x[first];
    const Real x2 = x[second];
    x[first] = x1 * cos[i] - x2 * sin[i];
    x[second] = x1 * sin[i] + x2 * cos[i];
  }
}

/// The sum of `a[i] b[i] c[i]` with `Weighted`, otherwise of `a[i] b[i]`.
template <bool Weighted, typename Real>
inline Real sum_of_products(const Real* a, const Real* b, const Real* c, int64_t count) {
  cpu::Lanes<Real, kSumLanes> lanes(0);
  int64_t begin = 0;
  for (; begin + kSumLanes <= count; begin += kSumLanes) {
    for (int i = 0; i < kSumLanes; ++i) {
      const Real product = a[begin + i] * b[begin + i];
      lanes.values[i] += Weighted ? product * c[begin + i] : product;
    }
  }
  for (int i = 0; begin + i < count; ++i) {
    const Real product = a[begin + i] * b[begin + i];
    lanes.values[i] += Weighted ? product * c[begin + i] : product;
  }
  return lanes.sum();
}

template <typename Real>
inline Real reciprocal_rms(const Real* x, int64_t count, Real eps) {
  return Real(1) / std::sqrt(sum_of_products<false>(x, x, x, count) / static_cast<Real>(count) + eps);
}

/// `x` is a buffer of a head.
template <typename T, bool Interleaved>
POSENC_CPU_CLONES void normalise_and_rotate(
    const TokenHeads<const T>& in,
    const TokenHeads<T>& out,
    const HeadParameters<arithmetic_t<T>>& row,
    arithmetic_t<T>* x) {
  using Real = arithmetic_t<T>;
  for (int64_t h = 0; h < row.num_heads; ++h) {
    read_head(in.head(h), in.strides.channel, row.head_dim, x);
    const Real rstd = reciprocal_rms(x, row.head_dim, row.eps);
    POSENC_INDEPENDENT
    for (int64_t i = 0; i < row.head_dim; ++i) {
      x[i] = x[i] * rstd * row.weight[i];
    }
    rotate_head<Interleaved>(x, row.cos, row.sin, row.num_pairs);
    write_head(x, row.head_dim, out.head(h), out.strides.channel);
  }
}

/// Stores the gradients of one token, and adds its terms to `weight_grad` unless that is null. `g` and `x` are buffers
/// of a head.
template <typename T, bool Interleaved>
POSENC_CPU_CLONES void gradients_of_token(
    const TokenHeads<const T>& grad,
    const TokenHeads<const T>& in,
    const TokenHeads<T>& out,
    const HeadParameters<arithmetic_t<T>>& row,
    arithmetic_t<T>* g,
    arithmetic_t<T>* x,
    double* weight_grad) {
  using Real = arithmetic_t<T>;
  for (int64_t h = 0; h < row.num_heads; ++h) {
    read_head(grad.head(h), grad.strides.channel, row.head_dim, g);
    read_head(in.head(h), in.strides.channel, row.head_dim, x);
    rotate_head<Interleaved>(g, row.cos, row.sin, row.num_pairs);
    const Real rstd = reciprocal_rms(x, row.head_dim, row.eps);
    const Real mean = rstd * sum_of_products<true>(g, x, row.weight, row.head_dim) / static_cast<Real>(row.head_dim);
    POSENC_INDEPENDENT
    for (int64_t i = 0; i < row.head_dim; ++i) {
      x[i] *= rstd;
    }
    if (weight_grad != nullptr) {
      POSENC_INDEPENDENT
      for (int64_t i = 0; i < row.head_dim; ++i) {
        weight_grad[i] += static_cast<double>(g[i] * x[i]);
      }
    }
    POSENC_INDEPENDENT
    for (int64_t i = 0; i < row.head_dim; ++i) {
      g[i] = rstd * (g[i] * row.weight[i] - x[i] * mean);
    }
    write_head(g, row.head_dim, out.head(h), out.strides.channel);
  }
}

/// The weights of both operands, dense and in the arithmetic type, plus 1 with `unit_offset`.
template <typename T>
std::vector<arithmetic_t<T>> widened_weights(const QKNormRotaryProblem& problem) {
  using Real = arithmetic_t<T>;
  const int64_t head_dim = problem.rotary.head_dim;
  std::vector<Real> widened(2 * head_dim);
  for (int32_t o = 0; o < problem.rotary.num_operands; ++o) {
    const QKNormRotaryProblem::Weight& weight = problem.weights[o];
    for (int64_t i = 0; i < head_dim; ++i) {
      const Real value = problem.weights_are_wide
          ? static_cast<const Real*>(weight.data)[i * weight.stride]
          : static_cast<Real>(static_cast<const T*>(weight.data)[i * weight.stride]);
      widened[o * head_dim + i] = problem.unit_offset ? 1 + value : value;
    }
  }
  return widened;
}

/// The entries of the tables for one token as dense arrays. `sin` has the sign of the rotation.
template <typename Real>
class DenseTokenTables {
 public:
  explicit DenseTokenTables(const RotaryProblem& problem)
      : tables_(problem), cos_(static_cast<size_t>(problem.num_pairs)), sin_(static_cast<size_t>(problem.num_pairs)) {}

  /// Whether the position of token (batch, seq) is in the tables; always true with several axes.
  bool read(int64_t batch, int64_t seq) {
    const auto row = tables_.row(batch, seq);
    if (!row.has_value()) {
      return false;
    }
    for (size_t pair = 0; pair < cos_.size(); ++pair) {
      cos_[pair] = row->cos[static_cast<int64_t>(pair) * row->cos_stride];
      sin_[pair] = row->sign * row->sin[static_cast<int64_t>(pair) * row->sin_stride];
    }
    return true;
  }

  const Real* cos() const { return cos_.data(); }
  const Real* sin() const { return sin_.data(); }

 private:
  cpu::TokenTables<Real> tables_;
  std::vector<Real> cos_, sin_;
};

int64_t elements_of_token(const RotaryProblem& problem) {
  return (problem.operands[0].num_heads + problem.operands[1].num_heads) * problem.head_dim;
}

template <typename T>
void run_typed(const QKNormRotaryProblem& problem) {
  using Real = arithmetic_t<T>;
  const RotaryProblem& rotary = problem.rotary;
  const std::vector<Real> weights = widened_weights<T>(problem);
  // The eps of a token without a row in the tables is NaN, which makes its heads NaN.
  const auto rotate = rotary.interleaved ? normalise_and_rotate<T, true> : normalise_and_rotate<T, false>;
  const int64_t grain = std::max<int64_t>(1, cpu::kGrainElements / std::max<int64_t>(1, elements_of_token(rotary)));
  at::parallel_for(0, rotary.batch * rotary.seq_len, grain, [&](int64_t begin, int64_t end) {
    DenseTokenTables<Real> tables(rotary);
    std::vector<Real> buffer(rotary.head_dim);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t batch = token / rotary.seq_len;
      const int64_t seq = token % rotary.seq_len;
      const bool exists = tables.read(batch, seq);
      for (int32_t o = 0; o < rotary.num_operands; ++o) {
        const RotaryProblem::Operand& operand = rotary.operands[o];
        const HeadParameters<Real> row{
            tables.cos(),
            tables.sin(),
            weights.data() + o * rotary.head_dim,
            operand.num_heads,
            rotary.head_dim,
            rotary.num_pairs,
            exists ? static_cast<Real>(problem.eps) : std::numeric_limits<Real>::quiet_NaN()};
        rotate(
            TokenHeads<const T>(operand.in, operand.in_strides, batch, seq),
            TokenHeads<T>(operand.out, operand.out_strides, batch, seq), row, buffer.data());
      }
    }
  });
}

template <typename T>
void run_backward_typed(const QKNormRotaryBackwardProblem& problem) {
  using Real = arithmetic_t<T>;
  const RotaryProblem& rotary = problem.call.rotary;
  const int64_t head_dim = rotary.head_dim;
  const int64_t num_tokens = rotary.batch * rotary.seq_len;
  const std::vector<Real> weights = widened_weights<T>(problem.call);
  const auto differentiate = rotary.interleaved ? gradients_of_token<T, true> : gradients_of_token<T, false>;
  const int64_t num_parts =
      std::clamp<int64_t>(num_tokens * elements_of_token(rotary) / cpu::kGrainElements, 1, kMaxParts);
  // [parts, operands, D]
  std::vector<double> sums(2 * num_parts * head_dim, 0.0);
  at::parallel_for(0, num_parts, /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    DenseTokenTables<Real> tables(rotary);
    std::vector<Real> buffers(2 * head_dim);
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t token = num_tokens * part / num_parts; token < num_tokens * (part + 1) / num_parts; ++token) {
        const int64_t batch = token / rotary.seq_len;
        const int64_t seq = token % rotary.seq_len;
        const bool exists = tables.read(batch, seq);
        for (int32_t o = 0; o < rotary.num_operands; ++o) {
          const RotaryProblem::Operand& operand = rotary.operands[o];
          const HeadParameters<Real> row{
              tables.cos(),
              tables.sin(),
              weights.data() + o * head_dim,
              operand.num_heads,
              head_dim,
              rotary.num_pairs,
              exists ? static_cast<Real>(problem.call.eps) : std::numeric_limits<Real>::quiet_NaN()};
          differentiate(
              TokenHeads<const T>(operand.in, operand.in_strides, batch, seq),
              TokenHeads<const T>(problem.inputs[o].data, problem.inputs[o].strides, batch, seq),
              TokenHeads<T>(operand.out, operand.out_strides, batch, seq), row, buffers.data(),
              buffers.data() + head_dim,
              problem.weight_grads[o] == nullptr ? nullptr : sums.data() + (2 * part + o) * head_dim);
        }
      }
    }
  });
  for (int32_t o = 0; o < rotary.num_operands; ++o) {
    if (problem.weight_grads[o] == nullptr) {
      continue;
    }
    const double* const of_operand = sums.data() + o * head_dim;
    for (int64_t i = 0; i < head_dim; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < num_parts; ++part) {
        sum += of_operand[2 * part * head_dim + i];
      }
      if (problem.call.weights_are_wide) {
        static_cast<Real*>(problem.weight_grads[o])[i] = static_cast<Real>(sum);
      } else {
        static_cast<T*>(problem.weight_grads[o])[i] = static_cast<T>(static_cast<Real>(sum));
      }
    }
  }
}

void run(const QKNormRotaryProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run_typed<typename decltype(type)::type>(problem); });
}

void run_backward(const QKNormRotaryBackwardProblem& problem, const at::Tensor& like) {
  cpu::for_dtype(like.scalar_type(), [&](auto type) { run_backward_typed<typename decltype(type)::type>(problem); });
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CPU, m) {
  m.impl("qk_norm_rotary_embedding", kernel<arguments::qk_norm_rotary_embedding<run>>);
  m.impl("qk_norm_rotary_embedding_backward", kernel<arguments::qk_norm_rotary_embedding_backward<run_backward>>);
}

}  // namespace posenc
