#include <arguments/rotary_embedding.h>
#include <arguments/rotary_embedding_qkv.h>
#include <cpu/detail/clones.h>
#include <cpu/detail/dispatch.h>
#include <cpu/detail/lanes.h>
#include <cpu/detail/rotary_token.h>
#include <ops/dispatch.h>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

namespace posenc {
namespace {

using cpu::arithmetic_t;

/// The heads of one token in one operand.
template <typename T>
struct Token {
  cpu::TokenHeads<const T> in;
  cpu::TokenHeads<T> out;
  int64_t num_heads, head_dim, num_pairs;
};

/// Rotates all heads of one token. The channel stride of the input is `InStride`, and those of output and tables are 1.
/// With `InStride` -1 all strides are arbitrary.
template <typename T, bool Interleaved, int InStride>
POSENC_CPU_CLONES void rotate_token(const Token<T>& token, const cpu::TokenRow<arithmetic_t<T>>& row) {
  using Real = arithmetic_t<T>;
  constexpr bool kAny = InStride < 0;
  const int64_t in_stride = kAny ? token.in.strides.channel : InStride;
  const int64_t out_stride = kAny ? token.out.strides.channel : 1;
  const int64_t cos_stride = kAny ? row.cos_stride : 1;
  const int64_t sin_stride = kAny ? row.sin_stride : 1;
  const int64_t pairs = token.num_pairs;
  const Real* cos = row.cos;
  const Real* sin = row.sin;
  const Real sign = row.sign;
  for (int64_t h = 0; h < token.num_heads; ++h) {
    const T* in = token.in.head(h);
    T* out = token.out.head(h);
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
    for (int64_t i = 2 * pairs; i < token.head_dim; ++i) {
      out[i * out_stride] = in[i * in_stride];
    }
  }
}

template <typename T>
void fill_nan(const Token<T>& token) {
  for (int64_t h = 0; h < token.num_heads; ++h) {
    T* out = token.out.head(h);
    for (int64_t i = 0; i < token.head_dim; ++i) {
      out[i * token.out.strides.channel] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

template <typename T>
void copy_token(const Token<T>& token) {
  for (int64_t h = 0; h < token.num_heads; ++h) {
    const T* in = token.in.head(h);
    T* out = token.out.head(h);
    for (int64_t i = 0; i < token.head_dim; ++i) {
      out[i * token.out.strides.channel] = in[i * token.in.strides.channel];
    }
  }
}

template <typename T>
void rotate_token(const Token<T>& token, const cpu::TokenRow<arithmetic_t<T>>& row, bool interleaved) {
  const bool dense = token.out.strides.channel == 1 && row.cos_stride == 1 && row.sin_stride == 1;
  const int64_t in_stride = dense ? token.in.strides.channel : -1;
  const auto rotate = in_stride == 1 ? (interleaved ? rotate_token<T, true, 1> : rotate_token<T, false, 1>)
      : in_stride == 0               ? (interleaved ? rotate_token<T, true, 0> : rotate_token<T, false, 0>)
                                     : (interleaved ? rotate_token<T, true, -1> : rotate_token<T, false, -1>);
  rotate(token, row);
}

template <typename T>
void run_typed(const RotaryProblem& problem) {
  using Real = arithmetic_t<T>;
  const int64_t num_heads = problem.num_heads();
  const int64_t grain = std::max<int64_t>(1, cpu::kGrainElements / std::max<int64_t>(1, num_heads * problem.head_dim));
  at::parallel_for(0, problem.batch * problem.seq_len, grain, [&](int64_t begin, int64_t end) {
    cpu::TokenTables<Real> tables(problem);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / problem.seq_len;
      const int64_t seq = i % problem.seq_len;
      const auto row = tables.row(batch, seq);
      for (int32_t o = 0; o < problem.num_operands; ++o) {
        const RotaryProblem::Operand& operand = problem.operands[o];
        const Token<T> token{
            {operand.in, operand.in_strides, batch, seq},
            {operand.out, operand.out_strides, batch, seq},
            operand.num_heads,
            problem.head_dim,
            problem.num_pairs};
        if (o == RotaryProblem::kCopied) {
          copy_token(token);
        } else if (row.has_value()) {
          rotate_token(token, *row, problem.interleaved);
        } else {
          fill_nan(token);
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
  m.impl("rotary_embedding", kernel<arguments::rotary_embedding<rotate>>);
  m.impl("rotary_embedding_", kernel<arguments::rotary_embedding_in_place<rotate>>);
  m.impl("rotary_embedding_qk", kernel<arguments::rotary_embedding_qk<rotate>>);
  m.impl("rotary_embedding_qk_", kernel<arguments::rotary_embedding_qk_in_place<rotate>>);
  m.impl("rotary_embedding_qkv", kernel<arguments::rotary_embedding_qkv<rotate>>);
  m.impl("rotary_embedding_pack", kernel<arguments::rotary_embedding_pack<rotate>>);
}

}  // namespace posenc
