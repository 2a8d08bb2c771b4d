#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

/// Shared by the test executables: devices and seeds, random calls of the operators, expected results from scalar
/// loops, and comparisons with derived tolerances.
namespace posenc::test {

// ---------------------------------------------------------------------------------------------------------------------
// Environment

/// Whether the library was built with its CUDA kernels.
#if POSENC_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

/// Seed of all random numbers: `POSENC_TEST_SEED`, or a fixed default. torch is seeded with it before each test.
uint64_t seed();

/// Integer value of an environment variable, or `otherwise` when it is unset or empty.
int64_t env_int(const char* name, int64_t otherwise);

/// Calls `check` with `POSENC_TEST_CASES` (default `otherwise`) seeds from `seed()` on, until one fails. A failure
/// prints the settings that repeat it alone: POSENC_TEST_SEED=<seed> POSENC_TEST_CASES=1.
void for_each_seed(int64_t otherwise, const std::function<void(uint64_t)>& check);

/// Reason why `device` cannot be used in this build or on this machine; empty if it can.
std::string unavailable(at::DeviceType device);

/// Skips the running test, with the reason, if `device` is unavailable. With `POSENC_REQUIRE_CUDA=1` in the
/// environment the test fails instead. Call it from `SetUp`.
void require_device(at::DeviceType device);

/// Sets the environment variable `name` for the lifetime of the object; nullptr unsets it.
class ScopedEnv {
 public:
  ScopedEnv(const char* name, const char* value);
  ~ScopedEnv();
  ScopedEnv(const ScopedEnv&) = delete;
  ScopedEnv& operator=(const ScopedEnv&) = delete;

 private:
  std::string name_;
  std::optional<std::string> before_;
};

/// Enables deterministic algorithms for the lifetime of the object. torch then fills uninitialized memory with NaN.
class DeterministicAlgorithms {
 public:
  DeterministicAlgorithms();
  ~DeterministicAlgorithms();
  DeterministicAlgorithms(const DeterministicAlgorithms&) = delete;
  DeterministicAlgorithms& operator=(const DeterministicAlgorithms&) = delete;
};

/// Device and dtype that a test runs with.
struct Target {
  at::DeviceType device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
};

std::ostream& operator<<(std::ostream& stream, const Target& target);

/// All dtypes of the operators on `device`.
std::vector<Target> targets(at::DeviceType device);

/// Dtype of cos and sin for inputs of `dtype`: float64 for float64, float32 for every other dtype.
at::ScalarType table_dtype(at::ScalarType dtype);

/// Fixture of tests that run with every dtype. ctest filters by the names of the instances: `Cpu` and `Cuda`.
class TargetTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { require_device(GetParam().device); }
  at::Device device() const { return at::Device(GetParam().device); }
  at::ScalarType dtype() const { return GetParam().dtype; }
};

/// Fixture of tests that run once per device.
class DeviceTest : public ::testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override { require_device(GetParam()); }
  at::Device device() const { return at::Device(GetParam()); }
};

std::string target_name(const ::testing::TestParamInfo<Target>& info);
std::string device_name(const ::testing::TestParamInfo<at::DeviceType>& info);

// ---------------------------------------------------------------------------------------------------------------------
// Random calls of the operators

/// Memory layout of an input of shape `[.., token, head, channel]`.
enum class Strides {
  dense,
  head_major,   // a view of [B, H, S, D]
  token_major,  // a view of [S, B, H, D]
  head_slice,   // a range of the heads of a packed projection
  odd_offset,   // storage offset of one element
  every_other,  // channels have stride 2
  reversed,     // dimensions stored in reverse order
  one_batch,    // stride 0 over the batch
  one_token,    // stride 0 over the tokens
  one_head,     // stride 0 over the heads
  one_channel,  // stride 0 over the channels
  one_value,    // stride 0 in every dimension, like the gradient of sum()
};
constexpr int kStrides = static_cast<int>(Strides::one_value) + 1;
const char* strides_name(Strides strides);

enum class PositionShape { absent, per_token, per_batch };
constexpr int kPositionShapes = static_cast<int>(PositionShape::per_batch) + 1;

enum class PositionStrides { dense, every_other, expanded };
constexpr int kPositionStrides = static_cast<int>(PositionStrides::expanded) + 1;

/// Axis of the positions that each pair of channels reads, if the positions have several axes.
enum class PairAxes {
  chunked,  // consecutive pairs share an axis: 0, 0, .., 1, 1, ..
  cycled,   // pair i reads axis i % axes
  random
};
constexpr int kPairAxes = static_cast<int>(PairAxes::random) + 1;

enum class TableShape { by_position, per_token, per_token_shared };
constexpr int kTableShapes = static_cast<int>(TableShape::per_token_shared) + 1;

enum class TableStrides { dense, slice, transposed, one_row };
constexpr int kTableStrides = static_cast<int>(TableStrides::one_row) + 1;

/// Printable description of one call of `rotary_embedding_qk`, from which `make_inputs` makes the arguments.
struct RotaryCase {
  std::string name = "Default";
  bool packed = false;  // [T, H, D] with T = tokens
  int64_t batch = 2;
  int64_t tokens = 5;
  int64_t q_heads = 4;
  int64_t k_heads = 2;
  int64_t head_dim = 16;
  int64_t rotary_dim = 16;
  int64_t spare_rows = 3;  // rows of by_position tables in excess of `tokens`
  bool interleaved = false;
  bool conjugate = false;
  Strides q_strides = Strides::dense;
  Strides k_strides = Strides::dense;
  PositionShape positions = PositionShape::absent;
  PositionStrides position_strides = PositionStrides::dense;
  at::ScalarType position_dtype = at::kLong;
  int64_t axes = 0;  // position axes; 0: positions without an axis dimension, no pair_axes
  PairAxes pair_axes = PairAxes::chunked;
  TableShape tables = TableShape::by_position;
  TableStrides table_strides = TableStrides::dense;

  std::vector<int64_t> sizes(int64_t heads) const;
};

std::ostream& operator<<(std::ostream& stream, const RotaryCase& c);

/// Arguments of `rotary_embedding_qk`.
struct RotaryInputs {
  at::Tensor q;
  at::Tensor k;
  at::Tensor cos;
  at::Tensor sin;
  std::optional<at::Tensor> positions = std::nullopt;
  bool interleaved = false;
  bool conjugate = false;
  std::vector<int64_t> pair_axes = {};
};

/// Arguments as `c` describes them. All values are normally distributed, also those of cos and sin: the operator is
/// linear in them and must not rely on `cos^2 + sin^2 = 1`. They are drawn on the CPU, so every device gets the same.
RotaryInputs make_inputs(const RotaryCase& c, const Target& target);

/// A normally distributed tensor `[.., token, head, channel]` with the given memory layout.
at::Tensor random_tensor(at::IntArrayRef sizes, const Target& target, Strides strides = Strides::dense);

/// `rotary_embedding`, `rotary_embedding_qk` and `reference::rotary_embedding` on these arguments.
at::Tensor rotate(const RotaryInputs& in, const at::Tensor& x);
std::tuple<at::Tensor, at::Tensor> rotate_qk(const RotaryInputs& in);
at::Tensor rotate_reference(const RotaryInputs& in, const at::Tensor& x);

/// The same arguments with `conjugate` inverted: the opposite rotation.
RotaryInputs backwards(const RotaryInputs& in);

/// Detached copies on the CPU in float64; positions in int64.
RotaryInputs in_float64(const RotaryInputs& in);

// ---------------------------------------------------------------------------------------------------------------------
// Expected values

/// int64 positions outside of tables with `rows` rows: just outside, far outside, and ones that would be valid rows
/// after truncation to 32 bits.
std::vector<int64_t> positions_outside(int64_t rows);

/// `rotary_embedding(x, ...)` by a scalar loop over the formula, in float64 on the CPU.
at::Tensor scalar_rotation(const RotaryInputs& in, const at::Tensor& x);

/// Gradients of cos and sin. For each element also the sum of the absolute terms, and the number of terms.
struct TableGradients {
  at::Tensor dcos;
  at::Tensor dsin;
  at::Tensor dcos_magnitude;
  at::Tensor dsin_magnitude;
  at::Tensor terms;
};

/// Gradients of cos and sin of `sum(grad * rotary_embedding(x, ...))` over all pairs `(grad, x)`, by a scalar loop in
/// float64 on the CPU.
TableGradients scalar_table_gradients(
    const RotaryInputs& in,
    const std::vector<std::pair<at::Tensor, at::Tensor>>& grads_and_inputs);

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons

/// Largest relative error of one rounding to `dtype`.
double unit_roundoff(at::ScalarType dtype);

/// Bound of the difference by rounding between `rotary_embedding(x, ...)` in the dtype of `x` and the reference in
/// float64 on the same values. float64 on the CPU, shape of `x`; derived at the definition.
at::Tensor rounding_bound(const RotaryInputs& in, const at::Tensor& x);

/// Expects the same shape, and `|actual - expected| <= bound` for every element.
void expect_within(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound);

/// Expects `actual` to be `rotary_embedding(x, ...)` within `rounding_bound`; channels from rotary_dim on exactly.
void expect_close_to_rounding(const at::Tensor& actual, const RotaryInputs& in, const at::Tensor& x);

/// Expects gradients of cos and sin, computed in their dtype, to equal `expected` within rounding.
void expect_table_gradients(const at::Tensor& dcos, const at::Tensor& dsin, const TableGradients& expected);

/// Expects the same shape, dtype and bits.
void expect_same_bits(const at::Tensor& actual, const at::Tensor& expected);

/// Expects `call` to throw `c10::Error` with a message that contains all of `parts`.
void expect_error(const std::function<void()>& call, const std::vector<std::string>& parts);

/// Sum of the products of all elements, in float64.
double inner_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace posenc::test
