#include "support.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace posenc::test {

// ---------------------------------------------------------------------------------------------------------------------
// Environment

uint64_t seed() {
  return static_cast<uint64_t>(env_int("POSENC_TEST_SEED", 20210420));
}

int64_t env_int(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? otherwise : std::strtoll(value, nullptr, 10);
}

void for_each_seed(int64_t otherwise, const std::function<void(uint64_t)>& check) {
  const int64_t cases = env_int("POSENC_TEST_CASES", otherwise);
  for (int64_t i = 0; i < cases && !::testing::Test::HasFailure(); ++i) {
    const uint64_t case_seed = seed() + static_cast<uint64_t>(i);
    SCOPED_TRACE(::testing::Message() << "POSENC_TEST_SEED=" << case_seed << " POSENC_TEST_CASES=1");
    at::manual_seed(case_seed);
    check(case_seed);
  }
}

std::string unavailable(at::DeviceType device) {
  if (device != at::kCUDA) {
    return "";
  }
  if (!kBuiltWithCuda) {
    return "built without CUDA";
  }
  return at::hasCUDA() ? "" : "no CUDA device";
}

void require_device(at::DeviceType device) {
  const std::string reason = unavailable(device);
  if (reason.empty()) {
    return;
  }
  if (env_int("POSENC_REQUIRE_CUDA", 0) != 0) {
    FAIL() << reason << ", and POSENC_REQUIRE_CUDA is set";
  }
  GTEST_SKIP() << reason;
}

ScopedEnv::ScopedEnv(const char* name, const char* value) : name_(name) {
  if (const char* before = std::getenv(name); before != nullptr) {
    before_ = before;
  }
  value != nullptr ? setenv(name, value, 1) : unsetenv(name);
}

ScopedEnv::~ScopedEnv() {
  before_ ? setenv(name_.c_str(), before_->c_str(), 1) : unsetenv(name_.c_str());
}

DeterministicAlgorithms::DeterministicAlgorithms() {
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
}

DeterministicAlgorithms::~DeterministicAlgorithms() {
  at::globalContext().setDeterministicAlgorithms(false, /*warn_only=*/false);
}

std::ostream& operator<<(std::ostream& stream, const Target& target) {
  return stream << target.device << " " << target.dtype;
}

std::vector<Target> targets(at::DeviceType device) {
  return {{device, at::kHalf}, {device, at::kBFloat16}, {device, at::kFloat}, {device, at::kDouble}};
}

at::ScalarType table_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

std::string target_name(const ::testing::TestParamInfo<Target>& info) {
  return at::toString(info.param.dtype);
}

std::string device_name(const ::testing::TestParamInfo<at::DeviceType>& info) {
  return c10::DeviceTypeName(info.param, /*lower_case=*/true);
}

// ---------------------------------------------------------------------------------------------------------------------
// Expected values

namespace {

/// Calls `visit(first, second, row)` for every pair of channels of every head: the offsets of the two channels in a
/// contiguous tensor of the shape of `x`, and the offset of their cosine and sine in contiguous tables.
void for_each_pair(
    const RotaryInputs& in,
    const at::Tensor& x,
    const std::function<void(int64_t, int64_t, int64_t)>& visit) {
  const bool packed = x.dim() == 3;
  const int64_t batch = packed ? 1 : x.size(0);
  const int64_t tokens = x.size(-3);
  const int64_t heads = x.size(-2);
  const int64_t head_dim = x.size(-1);
  const int64_t half = in.cos.size(-1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < tokens; ++s) {
      int64_t row = s;
      std::vector<int64_t> row_of_axis;
      if (in.positions) {
        const bool has_axes = !in.pair_axes.empty();
        for (int64_t axis = 0; axis < (has_axes ? in.positions->size(0) : 1); ++axis) {
          const at::Tensor of_axis = has_axes ? (*in.positions)[axis] : *in.positions;
          row_of_axis.push_back((of_axis.dim() == 1 ? of_axis[s] : of_axis[b][s]).item<int64_t>());
        }
        row = row_of_axis[0];
      } else if (in.cos.dim() == 3) {
        row = (in.cos.size(0) == 1 ? 0 : b) * tokens + s;
      }
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t head = ((b * tokens + s) * heads + h) * head_dim;
        for (int64_t i = 0; i < half; ++i) {
          const int64_t first = in.interleaved ? 2 * i : i;
          const int64_t second = in.interleaved ? 2 * i + 1 : i + half;
          const int64_t row_of_pair = in.pair_axes.empty() ? row : row_of_axis[in.pair_axes[i]];
          visit(head + first, head + second, row_of_pair * half + i);
        }
      }
    }
  }
}

}  // namespace

std::vector<int64_t> positions_outside(int64_t rows) {
  constexpr int64_t kWraps = int64_t{1} << 32;
  using Limits = std::numeric_limits<int64_t>;
  return {-1, -2, rows, rows + 1, 1'000'000, kWraps + 1, 1 - kWraps, Limits::max(), Limits::min()};
}

at::Tensor scalar_rotation(const RotaryInputs& in, const at::Tensor& x) {
  const RotaryInputs wide = in_float64(in);
  const at::Tensor source = x.detach().to(at::kCPU, at::kDouble).contiguous();
  const at::Tensor result = source.clone();
  const at::Tensor cos = wide.cos.contiguous();
  const at::Tensor sin = wide.sin.contiguous();
  const double* from = source.data_ptr<double>();
  double* to = result.data_ptr<double>();
  for_each_pair(wide, source, [&](int64_t first, int64_t second, int64_t row) {
    const double c = cos.data_ptr<double>()[row];
    const double s = in.conjugate ? -sin.data_ptr<double>()[row] : sin.data_ptr<double>()[row];
    to[first] = from[first] * c - from[second] * s;
    to[second] = from[first] * s + from[second] * c;
  });
  return result;
}

TableGradients scalar_table_gradients(
    const RotaryInputs& in,
    const std::vector<std::pair<at::Tensor, at::Tensor>>& grads_and_inputs) {
  const RotaryInputs wide = in_float64(in);
  const auto zeros = [&] { return at::zeros(wide.cos.sizes(), at::kDouble); };
  TableGradients result{zeros(), zeros(), zeros(), zeros(), zeros()};
  const double sign = in.conjugate ? -1 : 1;
  for (const auto& [grad, x] : grads_and_inputs) {
    const at::Tensor wide_grad = grad.detach().to(at::kCPU, at::kDouble).contiguous();
    const at::Tensor wide_x = x.detach().to(at::kCPU, at::kDouble).contiguous();
    const double* g = wide_grad.data_ptr<double>();
    const double* v = wide_x.data_ptr<double>();
    for_each_pair(wide, wide_x, [&](int64_t first, int64_t second, int64_t row) {
      result.dcos.data_ptr<double>()[row] += g[first] * v[first] + g[second] * v[second];
      result.dsin.data_ptr<double>()[row] += sign * (g[second] * v[first] - g[first] * v[second]);
      result.dcos_magnitude.data_ptr<double>()[row] += std::abs(g[first] * v[first]) + std::abs(g[second] * v[second]);
      result.dsin_magnitude.data_ptr<double>()[row] += std::abs(g[second] * v[first]) + std::abs(g[first] * v[second]);
      result.terms.data_ptr<double>()[row] += 2;
    });
  }
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons

double unit_roundoff(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 0x1p-11;
    case at::kBFloat16:
      return 0x1p-8;
    case at::kFloat:
      return 0x1p-24;
    default:
      return 0x1p-53;
  }
}

// Let u be the unit roundoff of the arithmetic (float32, or float64 for float64) and a = |x1 c| + |x2 s|. Two products
// and one sum, rounded separately or fused, have an error of at most a (2u + u^2). Rounding the result z to a narrower
// dtype with unit roundoff v adds at most v |z|, or half the spacing of subnormals; |z| is at most |y| plus the error
// so far. The expected value y has the same kind of error in float64. The bound does not allow a second rounding.
at::Tensor rounding_bound(const RotaryInputs& in, const at::Tensor& x) {
  const auto error_of = [](double u) { return 2 * u + u * u; };
  RotaryInputs wide = in_float64(in);
  const at::Tensor wide_x = x.detach().to(at::kCPU, at::kDouble);
  const at::Tensor y = rotate_reference(wide, wide_x).abs();
  wide.cos = wide.cos.abs();
  wide.sin = wide.sin.abs();
  // The two directions give |x1 c| - |x2 s| and |x1 c| + |x2 s|; `a` is the sum.
  const at::Tensor there = rotate_reference(wide, wide_x.abs());
  const at::Tensor back = rotate_reference(backwards(wide), wide_x.abs());
  const at::Tensor a = at::maximum(there, back);
  const double computed = error_of(unit_roundoff(table_dtype(x.scalar_type())));
  const double expected = error_of(unit_roundoff(at::kDouble));
  const bool narrows = x.scalar_type() != table_dtype(x.scalar_type());
  const double v = narrows ? unit_roundoff(x.scalar_type()) : 0;
  const double half_subnormal = x.scalar_type() == at::kHalf ? 0x1p-25 : 0;
  return y * v + a * (computed * (1 + v) + expected * (1 + v)) + half_subnormal;
}

void expect_within(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  const at::Tensor wide = actual.detach().to(at::kCPU, at::kDouble);
  // Relative bounds do not hold for values below the smallest normal number of float64.
  const at::Tensor allowed = bound + std::numeric_limits<double>::min();
  // not(<=) rather than >, so that NaN on either side fails.
  const at::Tensor wrong = ((wide - expected).abs() <= allowed).logical_not();
  const int64_t count = wrong.sum().item<int64_t>();
  if (count == 0) {
    return;
  }
  const at::Tensor where = wrong.nonzero()[0];
  const auto at_first = [&where](const at::Tensor& tensor) {
    at::Tensor element = tensor;
    for (int64_t d = 0; d < where.numel(); ++d) {
      element = element[where[d].item<int64_t>()];
    }
    return element.item<double>();
  };
  ADD_FAILURE() << count << " of " << wide.numel() << " elements differ; the first, at index "
                << std::vector<int64_t>(where.data_ptr<int64_t>(), where.data_ptr<int64_t>() + where.numel()) << ", is "
                << at_first(wide) << " where " << at_first(expected) << " +- " << at_first(bound.expand_as(expected))
                << " is expected";
}

void expect_close_to_rounding(const at::Tensor& actual, const RotaryInputs& in, const at::Tensor& x) {
  ASSERT_EQ(actual.sizes(), x.sizes());
  ASSERT_EQ(actual.scalar_type(), x.scalar_type());
  ASSERT_EQ(actual.device(), x.device());
  const int64_t rotary_dim = 2 * in.cos.size(-1);
  const RotaryInputs wide = in_float64(in);
  const at::Tensor expected = rotate_reference(wide, x.detach().to(at::kCPU, at::kDouble));
  const auto rotated = [rotary_dim](const at::Tensor& y) { return y.narrow(-1, 0, rotary_dim); };
  const auto tail = [rotary_dim](const at::Tensor& y) { return y.narrow(-1, rotary_dim, y.size(-1) - rotary_dim); };
  expect_within(rotated(actual), rotated(expected), rotated(rounding_bound(in, x)));
  SCOPED_TRACE("channels that pass through");
  expect_same_bits(tail(actual), tail(x));
}

// A sum of n rounded products in any order has an error of at most n u / (1 - n u) times the sum of their magnitudes
// (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). The expected value is summed in float64.
void expect_table_gradients(const at::Tensor& dcos, const at::Tensor& dsin, const TableGradients& expected) {
  const auto error_of = [&expected](double u) { return expected.terms * u / (1 - expected.terms * u); };
  const auto check = [&](const char* name, const at::Tensor& actual, const at::Tensor& value, const at::Tensor& sum) {
    if (!actual.defined()) {
      return;
    }
    SCOPED_TRACE(name);
    const at::Tensor factor = error_of(unit_roundoff(actual.scalar_type())) + error_of(unit_roundoff(at::kDouble));
    expect_within(actual, value, factor * sum);
  };
  check("gradient to cos", dcos, expected.dcos, expected.dcos_magnitude);
  check("gradient to sin", dsin, expected.dsin, expected.dsin_magnitude);
}

void expect_same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  ASSERT_TRUE(actual.defined());
  ASSERT_EQ(actual.sizes(), expected.sizes());
  ASSERT_EQ(actual.scalar_type(), expected.scalar_type());
  const at::Tensor a = actual.detach().cpu().contiguous();
  const at::Tensor b = expected.detach().cpu().contiguous();
  if (a.numel() == 0) {
    return;
  }
  EXPECT_EQ(std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()), 0)
      << (a != b).sum().item<int64_t>() << " of " << a.numel() << " elements differ";
}

void expect_error(const std::function<void()>& call, const std::vector<std::string>& parts) {
  try {
    call();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    for (const std::string& part : parts) {
      EXPECT_NE(message.find(part), std::string::npos) << "'" << part << "' is not in the message: " << message;
    }
    return;
  }
  ADD_FAILURE() << "no error was raised";
}

double inner_product(const at::Tensor& a, const at::Tensor& b) {
  const auto widen = [](const at::Tensor& x) { return x.detach().to(at::kCPU, at::kDouble); };
  return (widen(a) * widen(b)).sum().item<double>();
}

}  // namespace posenc::test
