#include "alibi_support.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace posenc::test {

// ---------------------------------------------------------------------------------------------------------------------
// Random calls

std::vector<int64_t> AlibiCase::sizes() const {
  return batched ? std::vector<int64_t>{batch, heads, q_len, k_len} : std::vector<int64_t>{heads, q_len, k_len};
}

std::ostream& operator<<(std::ostream& stream, const AlibiCase& c) {
  constexpr const char* kMaskNames[kMaskStrides] = {"dense", "every_other", "transposed", "one_batch"};
  stream << c.name << ": scores " << at::IntArrayRef(c.sizes()) << " " << strides_name(c.strides) << ", scale "
         << c.scale << (c.causal ? ", causal" : "") << (c.every_other_slope ? ", every other slope" : "");
  if (c.query_offset) {
    stream << ", query_offset " << *c.query_offset;
  }
  if (c.masked) {
    stream << ", mask " << kMaskNames[static_cast<int>(c.mask_strides)];
  }
  return stream;
}

std::vector<AlibiCase> small_alibi_cases() {
  std::vector<AlibiCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(AlibiCase&)>& change) {
    AlibiCase c;
    c.name = name;
    c.heads = 2;
    c.q_len = 3;
    c.k_len = 4;
    change(c);
    cases.push_back(c);
  };
  add("Plain", [](AlibiCase&) {});
  add("Causal", [](AlibiCase& c) { c.causal = true; });
  add("Masked", [](AlibiCase& c) { c.masked = true; });
  add("AllFlags", [](AlibiCase& c) {
    c.causal = c.masked = true;
    c.scale = 0.5;
    c.query_offset = 2;
  });
  add("RowsWithNothingVisible", [](AlibiCase& c) {
    c.causal = true;
    c.query_offset = -1;
  });
  add("MoreQueriesThanKeys", [](AlibiCase& c) { c.q_len = 5, c.k_len = 2; });
  add("NegativeScale", [](AlibiCase& c) { c.scale = -1.5; });
  add("ThreeDimensions", [](AlibiCase& c) { c.batched = false, c.masked = true; });
  add("Strided", [](AlibiCase& c) {
    c.strides = Strides::reversed;
    c.every_other_slope = true;
  });
  add("OneKey", [](AlibiCase& c) { c.k_len = 1; });
  return cases;
}

at::Tensor random_mask(int64_t batch, int64_t k_len, at::DeviceType device, MaskStrides strides) {
  const auto draw = [device](at::IntArrayRef sizes) { return at::randint(3, sizes, at::kLong).eq(0).to(device); };
  switch (strides) {
    case MaskStrides::dense:
      break;
    case MaskStrides::every_other:
      return draw({batch, 2 * k_len}).slice(1, 0, 2 * k_len, 2);
    case MaskStrides::transposed:
      return draw({k_len, batch}).t();
    case MaskStrides::one_batch:
      return draw({1, k_len}).expand({batch, k_len});
  }
  return draw({batch, k_len});
}

AlibiInputs make_alibi_inputs(const AlibiCase& c, const Target& target) {
  AlibiInputs in;
  in.scores = random_tensor(c.sizes(), target, c.strides);
  const int64_t stored = c.every_other_slope ? 2 * c.heads : c.heads;
  in.slopes = (at::randint(1, 256, {stored}, at::kFloat) / 256).to(target.device);
  if (c.every_other_slope) {
    in.slopes = in.slopes.slice(0, 0, stored, 2);
  }
  in.causal = c.causal;
  in.query_offset = c.query_offset;
  in.scale = c.scale;
  if (c.masked) {
    in.key_padding_mask = random_mask(c.batched ? c.batch : 1, c.k_len, target.device, c.mask_strides);
  }
  return in;
}

AlibiInputs with_alibi_grad(const AlibiInputs& in, bool scores, bool slopes) {
  AlibiInputs leaves = in;
  if (in.scores.defined()) {
    leaves.scores = in.scores.detach().requires_grad_(scores);
  }
  leaves.slopes = in.slopes.detach().requires_grad_(slopes);
  return leaves;
}

at::Tensor bias_of(const AlibiInputs& in, at::ScalarType dtype) {
  return posenc::alibi_bias(in.slopes, in.scores.size(-2), in.scores.size(-1), in.causal, dtype, in.query_offset);
}

at::Tensor add_of(const AlibiInputs& in) {
  return posenc::alibi_add(in.scores, in.slopes, in.causal, in.query_offset);
}

at::Tensor softmax_of(const AlibiInputs& in) {
  return posenc::alibi_softmax(in.scores, in.slopes, in.scale, in.causal, in.key_padding_mask, in.query_offset);
}

// ---------------------------------------------------------------------------------------------------------------------
// Expected values

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::Tensor widened(const at::Tensor& x) {
  return x.detach().to(at::kCPU, at::kDouble).contiguous();
}

/// The position of query 0.
int64_t first_position(int64_t q_len, int64_t k_len, const std::optional<int64_t>& query_offset) {
  return query_offset.value_or(k_len - q_len);
}

/// Distances for the scores of `in`, `[Sq, Sk]`.
at::Tensor distances_of(const AlibiInputs& in) {
  return scalar_distances(in.scores.size(-2), in.scores.size(-1), in.query_offset);
}

/// Sum of `[B, H, Sq, Sk]` or `[H, Sq, Sk]` over all dimensions except H.
at::Tensor per_head(const at::Tensor& terms) {
  return terms.dim() == 4 ? terms.sum({0, 2, 3}) : terms.sum({1, 2});
}

}  // namespace

at::Tensor scalar_distances(int64_t q_len, int64_t k_len, const std::optional<int64_t>& query_offset) {
  const at::Tensor result = at::empty({q_len, k_len}, at::kDouble);
  double* to = result.data_ptr<double>();
  const int64_t first = first_position(q_len, k_len, query_offset);
  for (int64_t i = 0; i < q_len; ++i) {
    for (int64_t j = 0; j < k_len; ++j) {
      *to++ = static_cast<double>(std::abs(first + i - j));
    }
  }
  return result;
}

at::Tensor scalar_bias(
    const at::Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    const std::optional<int64_t>& query_offset) {
  const at::Tensor m = widened(slopes);
  const at::Tensor result = at::empty({m.numel(), q_len, k_len}, at::kDouble);
  double* to = result.data_ptr<double>();
  const int64_t first = first_position(q_len, k_len, query_offset);
  for (int64_t h = 0; h < m.numel(); ++h) {
    const double slope = m.data_ptr<double>()[h];
    for (int64_t i = 0; i < q_len; ++i) {
      for (int64_t j = 0; j < k_len; ++j) {
        const int64_t ahead = j - (first + i);
        *to++ = causal && ahead > 0 ? -kInfinity : -slope * static_cast<double>(std::abs(ahead));
      }
    }
  }
  return result;
}

at::Tensor scalar_bias(const AlibiInputs& in) {
  at::Tensor bias = scalar_bias(in.slopes, in.scores.size(-2), in.scores.size(-1), in.causal, in.query_offset)
                        .expand(in.scores.sizes());
  if (!in.key_padding_mask) {
    return bias;
  }
  const at::Tensor mask = in.key_padding_mask->cpu();
  const at::Tensor hidden = in.scores.dim() == 4 ? mask.view({mask.size(0), 1, 1, -1}) : mask.view({1, 1, -1});
  return bias.masked_fill(hidden, -kInfinity);
}

at::Tensor scalar_softmax(const AlibiInputs& in) {
  const at::Tensor x = (widened(in.scores) * in.scale + scalar_bias(in)).contiguous();
  const at::Tensor result = at::zeros_like(x);
  const int64_t keys = x.size(-1);
  const int64_t rows = keys == 0 ? 0 : x.numel() / keys;
  for (int64_t r = 0; r < rows; ++r) {
    const double* from = x.data_ptr<double>() + r * keys;
    double* to = result.data_ptr<double>() + r * keys;
    double largest = -kInfinity;
    for (int64_t j = 0; j < keys; ++j) {
      largest = std::max(largest, from[j]);
    }
    if (largest == -kInfinity) {
      continue;
    }
    double sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      to[j] = std::exp(from[j] - largest);
      sum += to[j];
    }
    for (int64_t j = 0; j < keys; ++j) {
      to[j] /= sum;
    }
  }
  return result;
}

AlibiGradients scalar_add_gradients(const AlibiInputs& in, const at::Tensor& grad) {
  const at::Tensor hidden = scalar_bias(in).isinf();
  const at::Tensor g = widened(grad).masked_fill(hidden, 0);
  const at::Tensor terms = g * distances_of(in);
  return {g, -per_head(terms), per_head(terms.abs())};
}

AlibiGradients scalar_softmax_gradients(const AlibiInputs& in, const at::Tensor& grad) {
  const at::Tensor p = scalar_softmax(in);
  const at::Tensor g = widened(grad);
  const at::Tensor dx = p * (g - (g * p).sum(-1, /*keepdim=*/true));
  const at::Tensor terms = dx * distances_of(in);
  return {dx * in.scale, -per_head(terms), per_head(terms.abs())};
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons

namespace {

bool is_narrow(at::ScalarType dtype) {
  return dtype == at::kHalf || dtype == at::kBFloat16;
}

/// Error of rounding values of these magnitudes to `dtype`; zero for float32 and float64, the dtypes of the arithmetic.
at::Tensor store_error(const at::Tensor& magnitude, at::ScalarType dtype) {
  const bool narrows = is_narrow(dtype);
  const double half_subnormal = dtype == at::kHalf ? 0x1p-25 : 0;
  return narrows ? magnitude * unit_roundoff(dtype) + half_subnormal : at::zeros_like(magnitude);
}

/// Unit roundoff of the arithmetic for tensors of `dtype`: float64 for float64, float32 for all others.
double arithmetic_roundoff(at::ScalarType dtype) {
  return unit_roundoff(table_dtype(dtype));
}

/// Bound of the relative error of the softmax of `in` before it is rounded to its dtype. Let x = scale s - m d and u be
/// the unit roundoff. x has an error of at most 4u (|scale s| + |m d|): scale rounded to float32, its product, m d, a
/// factor log2(e), the sum. x - max adds u |x - max|. Both are relative errors of exp(x - max); exp itself adds up to
/// 8u. The error of max cancels. The sum of n terms in any order adds n u and the mean of their errors (Higham, section
/// 4.2), rescaling and the quotient a few u.
at::Tensor softmax_relative_error(const AlibiInputs& in, const at::Tensor& p) {
  const double u = arithmetic_roundoff(in.scores.scalar_type());
  const at::Tensor scaled = widened(in.scores) * in.scale;
  const at::Tensor bias = scalar_bias(in);
  const at::Tensor hidden = bias.isinf();
  const at::Tensor x = scaled + bias;
  const at::Tensor below = (x - x.amax(-1, /*keepdim=*/true)).abs();
  const at::Tensor exponent =
      ((scaled.abs() + bias.abs()) * (4 * u) + below * u).masked_fill(hidden, 0).nan_to_num(0, 0, 0);
  const double n = static_cast<double>(in.scores.size(-1));
  return exponent + (exponent * p).sum(-1, /*keepdim=*/true) + (n + 32) * u;
}

/// Exponentials below this may be flushed to zero: twice the smallest normal number of float32.
double smallest_exponential(at::ScalarType dtype) {
  return dtype == at::kDouble ? 0 : 0x1p-125;
}

}  // namespace

void expect_within_or_infinite(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  const at::Tensor infinite = expected.isinf();
  const at::Tensor wide = widened(actual);
  EXPECT_TRUE(wide.eq(expected).logical_or(infinite.logical_not()).all().item<bool>()) << "an infinity is missing";
  const auto finite = [&infinite](const at::Tensor& x) { return x.expand_as(infinite).masked_fill(infinite, 0); };
  expect_within(finite(wide), finite(expected), finite(bound));
}

// Integer distances are exact in float32 up to 2^24 and rounded once beyond. Their product with the slope is rounded.
void expect_bias(const at::Tensor& actual, const AlibiInputs& in, int64_t q_len, int64_t k_len) {
  const at::Tensor expected = scalar_bias(in.slopes, q_len, k_len, in.causal, in.query_offset);
  const double u = arithmetic_roundoff(actual.scalar_type());
  const at::Tensor magnitude = expected.abs();
  const at::Tensor distances = scalar_distances(q_len, k_len, in.query_offset);
  const at::Tensor computed = magnitude * at::where(distances > 0x1p24, 2 * u + u * u, u);
  const at::Tensor stored = store_error(magnitude + computed, actual.scalar_type());
  expect_within_or_infinite(actual, expected, computed + stored);
}

// Two roundings in float32 or float64: the product of slope and distance, and its sum with the score. The expected
// value has the same two in float64.
void expect_sum(const at::Tensor& actual, const AlibiInputs& in) {
  ASSERT_EQ(actual.scalar_type(), in.scores.scalar_type());
  AlibiInputs without_mask = in;
  without_mask.key_padding_mask = std::nullopt;
  const at::Tensor bias = scalar_bias(without_mask);
  const at::Tensor expected = widened(in.scores) + bias;
  const auto error_of = [&](double u) { return (bias.abs() * (2 + u) + expected.abs()) * u; };
  const at::Tensor computed =
      error_of(arithmetic_roundoff(actual.scalar_type())) + error_of(unit_roundoff(at::kDouble));
  expect_within_or_infinite(actual, expected, computed + store_error(expected.abs() + computed, actual.scalar_type()));
}

void expect_softmax(const at::Tensor& actual, const AlibiInputs& in) {
  ASSERT_EQ(actual.scalar_type(), in.scores.scalar_type());
  const at::Tensor p = scalar_softmax(in);
  const at::ScalarType dtype = actual.scalar_type();
  const at::Tensor computed =
      p * (softmax_relative_error(in, p) + static_cast<double>(p.size(-1) + 4) * unit_roundoff(at::kDouble)) +
      smallest_exponential(dtype);
  const at::Tensor hidden = scalar_bias(in).isinf();
  // Masked probabilities must be exactly zero.
  expect_within(actual, p, (computed + store_error(p + computed, dtype)).masked_fill(hidden, 0));
}

// ds = scale p (g - D) with D = sum g p. The error of p consists of that of the softmax, the rounding of the saved
// result to its dtype, and, through the division by their sum, the errors of the other probabilities of the row. The
// error of D consists of those of its terms and of their sum.
void expect_softmax_gradients(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    const AlibiInputs& in,
    const at::Tensor& grad) {
  const at::ScalarType dtype = in.scores.scalar_type();
  const double u = arithmetic_roundoff(dtype);
  const AlibiGradients expected = scalar_softmax_gradients(in, grad);
  const at::Tensor p = scalar_softmax(in);
  const at::Tensor g = widened(grad);
  const double n = static_cast<double>(p.size(-1));
  const at::Tensor saved_error =
      p * softmax_relative_error(in, p) + smallest_exponential(dtype) + store_error(p, dtype);
  const at::Tensor p_error = saved_error + p * (saved_error.sum(-1, /*keepdim=*/true) + (n + 4) * u);
  const at::Tensor gp = g * p;
  const at::Tensor mean = gp.sum(-1, /*keepdim=*/true);
  const at::Tensor mean_error = (g.abs() * p_error + gp.abs() * ((n + 2) * u)).sum(-1, /*keepdim=*/true);
  const at::Tensor dx_error =
      (p_error * ((g - mean).abs() + mean_error) + p * (mean_error + (g.abs() + mean.abs()) * (4 * u)))
          .masked_fill(scalar_bias(in).isinf(), 0);
  if (scores.defined()) {
    SCOPED_TRACE("gradient to scores");
    ASSERT_EQ(scores.scalar_type(), dtype);
    const at::Tensor error = dx_error * (std::abs(in.scale) * (1 + 2 * u)) + expected.scores.abs() * (2 * u);
    const at::Tensor stored = store_error(expected.scores.abs() + error, dtype);
    expect_within(
        scores, expected.scores,
        (error + stored).masked_fill(scalar_bias(in).isinf(), 0) + expected.scores.abs() * 0x1p-48);
  }
  if (slopes.defined()) {
    SCOPED_TRACE("gradient to slopes");
    const at::Tensor error = per_head(dx_error * distances_of(in));
    // Allows the sum over rows and keys a relative error of 1e-6 of its absolute terms.
    const at::Tensor sum_error = expected.slopes_magnitude * 1e-6;
    expect_within(slopes, expected.slopes, error + sum_error + expected.slopes.abs() * unit_roundoff(at::kFloat));
  }
}

void expect_accurate_slopes(const at::Tensor& actual, const AlibiInputs& in, const at::Tensor& grad) {
  const at::ScalarType dtype = in.scores.scalar_type();
  const double relative = is_narrow(dtype) ? 1e-2 : dtype == at::kFloat ? 1e-5 : 1e-12;
  const at::Tensor hidden = scalar_bias(in).isinf();
  const at::Tensor p = scalar_softmax(in);
  const at::Tensor g = widened(grad).masked_fill(hidden, 0);
  const auto mean = [&p](const at::Tensor& x) { return (p * x).sum(-1, /*keepdim=*/true); };
  const at::Tensor centred_g = g - mean(g);
  const at::Tensor d = distances_of(in).expand_as(p);
  const at::Tensor centred_d = d - mean(d);
  const at::Tensor terms = p * centred_g * centred_d;
  const at::Tensor expected = -per_head(terms);
  const double size = std::max(expected.norm().item<double>(), terms.norm().item<double>());
  // Errors of the mean of g in the dtype of the arithmetic, and of probabilities rounded to subnormal half numbers.
  const double arithmetic = 32 * arithmetic_roundoff(dtype) * (p * g.abs() * centred_d.abs()).sum().item<double>();
  const double subnormal =
      dtype == at::kHalf ? 0x1p-25 * (centred_g * centred_d).masked_fill(hidden, 0).abs().sum().item<double>() : 0;
  // Autograd casts the gradient to the dtype of the slopes, which is float32 even for float64 scores.
  ASSERT_EQ(actual.scalar_type(), in.slopes.scalar_type());
  const double cast = unit_roundoff(actual.scalar_type()) * expected.norm().item<double>();
  EXPECT_LE((widened(actual) - expected).norm().item<double>(), relative * size + arithmetic + subnormal + cast)
      << "gradient " << expected.norm().item<double>() << ", root of the sum of squared terms "
      << terms.norm().item<double>();
}

void expect_slope_gradient(const at::Tensor& actual, const AlibiGradients& expected, double relative) {
  const double rounding = unit_roundoff(actual.scalar_type());
  expect_within(actual, expected.slopes, expected.slopes_magnitude * relative + expected.slopes.abs() * rounding);
}

}  // namespace posenc::test
