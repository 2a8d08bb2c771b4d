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

/// What the test executables share: where tests run, random calls of the operators, their results worked out by a
/// scalar loop, and comparisons with derived tolerances.
namespace posenc::test {

// ---------------------------------------------------------------------------------------------------------------------
// Environment

/// Whether the library was built with its CUDA kernels.
#if POSENC_CUDA
constexpr bool kBuiltWithCuda = true;
#else
constexpr bool kBuiltWithCuda = false;
#endif

/// Seed of all random numbers: `POSENC_TEST_SEED`, or a fixed one. It is set anew before each test.
uint64_t seed();

/// Integer value of an environment variable, or `otherwise` when it is not set.
int64_t env_int(const char* name, int64_t otherwise);

/// Calls `check` with one seed after the other from `seed()` on, until one fails: as many as `POSENC_TEST_CASES` asks
/// for, or `otherwise`. A failing one is printed: POSENC_TEST_SEED=<seed> POSENC_TEST_CASES=1 repeats it alone.
void for_each_seed(int64_t otherwise, const std::function<void(uint64_t)>& check);

/// Why nothing can run on `device` here; empty when it can.
std::string unavailable(at::DeviceType device);

/// Skips the running test, with the reason, when nothing can run on `device`. With `POSENC_REQUIRE_CUDA=1` in the
/// environment the test fails instead. To be called from `SetUp`.
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

/// Device and dtype that a test runs with.
struct Target {
  at::DeviceType device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
};

std::ostream& operator<<(std::ostream& stream, const Target& target);

/// All dtypes of the operators on `device`.
std::vector<Target> targets(at::DeviceType device);

/// float32 for narrow dtypes and float32, float64 for float64.
at::ScalarType table_dtype(at::ScalarType dtype);

/// Test of every dtype on one device. Suites are instantiated as `Cpu` and `Cuda`: test filters go by these names.
class TargetTest : public ::testing::TestWithParam<Target> {
 protected:
  void SetUp() override { require_device(GetParam().device); }
  at::Device device() const { return at::Device(GetParam().device); }
  at::ScalarType dtype() const { return GetParam().dtype; }
};

/// Test of one device.
class DeviceTest : public ::testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override { require_device(GetParam()); }
  at::Device device() const { return at::Device(GetParam()); }
};

std::string target_name(const ::testing::TestParamInfo<Target>& info);
std::string device_name(const ::testing::TestParamInfo<at::DeviceType>& info);

// ---------------------------------------------------------------------------------------------------------------------
// Random calls of the operators

/// How an input of shape `[.., token, head, channel]` lies in memory.
enum class Strides {
  dense,
  head_major,   // a view of [B, H, S, D]
  token_major,  // a view of [S, B, H, D]
  head_slice,   // some of the heads of a packed projection
  odd_offset,   // storage offset of one element
  every_other,  // channels two elements apart
  reversed,     // channels outermost
  one_batch,    // stride 0 over the batch
  one_token,    // stride 0 over the tokens
  one_head,     // stride 0 over the heads
  one_channel,  // stride 0 over the channels
  one_value,    // stride 0 everywhere, as the gradient of sum()
};
constexpr int kStrides = static_cast<int>(Strides::one_value) + 1;
const char* strides_name(Strides strides);

enum class PositionShape { absent, per_token, per_batch };
constexpr int kPositionShapes = static_cast<int>(PositionShape::per_batch) + 1;

enum class PositionStrides { dense, every_other, expanded };
constexpr int kPositionStrides = static_cast<int>(PositionStrides::expanded) + 1;

/// Which axis of the positions each pair reads, where positions have several.
enum class PairAxes {
  chunked,  // the first pairs read axis 0, the next axis 1, ...
  cycled,   // one after the other
  random
};
constexpr int kPairAxes = static_cast<int>(PairAxes::random) + 1;

enum class TableShape { by_position, per_token, per_token_shared };
constexpr int kTableShapes = static_cast<int>(TableShape::per_token_shared) + 1;

enum class TableStrides { dense, slice, transposed, one_row };
constexpr int kTableStrides = static_cast<int>(TableStrides::one_row) + 1;

/// One call of `rotary_embedding_qk`, described so that it can be printed and made again.
struct RotaryCase {
  std::string name = "Default";
  bool packed = false;  // [T, H, D] with T = tokens
  int64_t batch = 2;
  int64_t tokens = 5;
  int64_t q_heads = 4;
  int64_t k_heads = 2;
  int64_t head_dim = 16;
  int64_t rotary_dim = 16;
  int64_t spare_rows = 3;  // rows of a table by position beyond the number of tokens
  bool interleaved = false;
  bool conjugate = false;
  Strides q_strides = Strides::dense;
  Strides k_strides = Strides::dense;
  PositionShape positions = PositionShape::absent;
  PositionStrides position_strides = PositionStrides::dense;
  at::ScalarType position_dtype = at::kLong;
  int64_t axes = 0;  // of positions that are there; 0: one, and no pair_axes
  PairAxes pair_axes = PairAxes::chunked;
  TableShape tables = TableShape::by_position;
  TableStrides table_strides = TableStrides::dense;

  std::vector<int64_t> sizes(int64_t heads) const;
};

std::ostream& operator<<(std::ostream& stream, const RotaryCase& c);

/// Arguments of a call.
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

/// Arguments as `c` describes them. Values are normal, those of the tables too (the operator is linear in
/// them and must not rely on `cos^2 + sin^2 = 1`), drawn on the CPU and so the same for every device.
RotaryInputs make_inputs(const RotaryCase& c, const Target& target);

/// A normal tensor `[.., token, head, channel]` with the strides asked for.
at::Tensor random_tensor(at::IntArrayRef sizes, const Target& target, Strides strides = Strides::dense);

/// Calls of `posenc::rotary_embedding` and `_qk` and of their references on these arguments.
at::Tensor rotate(const RotaryInputs& in, const at::Tensor& x);
std::tuple<at::Tensor, at::Tensor> rotate_qk(const RotaryInputs& in);
at::Tensor rotate_reference(const RotaryInputs& in, const at::Tensor& x);

/// The same arguments for the rotation the other way round.
RotaryInputs backwards(const RotaryInputs& in);

/// The same values on the CPU in float64 (positions in int64), detached.
RotaryInputs in_float64(const RotaryInputs& in);

// ---------------------------------------------------------------------------------------------------------------------
// Expected values

/// Positions, int64, that tables of `rows` rows do not have: just outside, far outside, and those that are a row of the
/// tables when they are cut to 32 bits.
std::vector<int64_t> positions_outside(int64_t rows);

/// `rotary_embedding(x, ...)` by a loop over scalars, in float64 on the CPU, from the formula alone.
at::Tensor scalar_rotation(const RotaryInputs& in, const at::Tensor& x);

/// Gradients to cos and sin, and for each of their elements the sum of the absolute terms and how many there are.
struct TableGradients {
  at::Tensor dcos;
  at::Tensor dsin;
  at::Tensor dcos_magnitude;
  at::Tensor dsin_magnitude;
  at::Tensor terms;
};

/// The gradients to the tables of `sum(grad * rotary_embedding(x, ...))` over all pairs `(grad, x)`, by a loop over
/// scalars, in float64 on the CPU.
TableGradients scalar_table_gradients(
    const RotaryInputs& in,
    const std::vector<std::pair<at::Tensor, at::Tensor>>& grads_and_inputs);

// ---------------------------------------------------------------------------------------------------------------------
// Comparisons

/// Largest relative error of one rounding to `dtype`.
double unit_roundoff(at::ScalarType dtype);

/// Largest difference that correct arithmetic can show between `rotary_embedding(x, ...)` in the dtype of `x` and the
/// reference in float64 on the same values; float64 on the CPU, of the shape of `x`. See the definition.
at::Tensor rounding_bound(const RotaryInputs& in, const at::Tensor& x);

/// Expects `|actual - expected| <= bound` of every element, and the same shape.
void expect_within(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound);

/// Expects `actual`, computed by the operator from `in` and `x`, to be the reference in float64 but for rounding.
void expect_close_to_rounding(const at::Tensor& actual, const RotaryInputs& in, const at::Tensor& x);

/// Expects gradients to the tables, computed in the dtype of the tables, to be `expected` but for rounding.
void expect_table_gradients(const at::Tensor& dcos, const at::Tensor& dsin, const TableGradients& expected);

/// Expects the same shape, dtype and bits.
void expect_same_bits(const at::Tensor& actual, const at::Tensor& expected);

/// Expects `call` to throw `c10::Error` with a message that contains each of `parts`.
void expect_error(const std::function<void()>& call, const std::vector<std::string>& parts);

/// Sum of the products of all elements, in float64.
double inner_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace posenc::test
