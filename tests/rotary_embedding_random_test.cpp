#include "gradcheck.h"
#include "support.h"

#include <ATen/ATen.h>

#include <random>

namespace posenc::test {
namespace {

/// Draws random combinations of all fields of `RotaryCase`.
class RandomCases {
 public:
  explicit RandomCases(uint64_t seed) : generator_(seed) {}

  at::ScalarType dtype() { return pick<at::ScalarType>({at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}); }

  RotaryCase next() {
    RotaryCase c;
    c.name = "Random";
    c.packed = chance(4);
    c.batch = between(1, 4);
    c.tokens = chance(4) ? between(1, 130) : between(1, 9);
    c.q_heads = between(1, 9);
    c.k_heads = between(1, 9);
    const int64_t pairs = chance(2) ? between(1, 70) : pick<int64_t>({1, 4, 8, 16, 32, 64});
    c.rotary_dim = 2 * pairs;
    c.head_dim = c.rotary_dim + (chance(2) ? between(1, 40) : 0);
    c.interleaved = chance(2);
    c.conjugate = chance(2);
    c.q_strides = any<Strides>(kStrides);
    c.k_strides = chance(2) ? c.q_strides : any<Strides>(kStrides);
    c.tables = c.packed || chance(2) ? TableShape::by_position : any<TableShape>(kTableShapes);
    c.table_strides = chance(2) ? TableStrides::dense : any<TableStrides>(kTableStrides);
    if (c.tables == TableShape::by_position) {
      c.positions = any<PositionShape>(kPositionShapes);
      if (c.packed && c.positions == PositionShape::per_batch) {
        c.positions = PositionShape::per_token;
      }
      c.position_strides = any<PositionStrides>(kPositionStrides);
      c.position_dtype = chance(2) ? at::kInt : at::kLong;
      if (c.positions != PositionShape::absent && chance(3)) {
        c.axes = between(1, 4);
        c.pair_axes = any<PairAxes>(kPairAxes);
      }
      // With positions, tables may have fewer rows than tokens.
      c.spare_rows = c.positions == PositionShape::absent ? between(0, 5) : between(1 - c.tokens, 5);
    }
    return c;
  }

  Strides strides() { return any<Strides>(kStrides); }

 private:
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(generator_() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int64_t one_in) { return between(1, one_in) == 1; }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return *(values.begin() + between(0, static_cast<int64_t>(values.size()) - 1));
  }
  template <typename Enum>
  Enum any(int count) {
    return static_cast<Enum>(between(0, count - 1));
  }

  std::mt19937_64 generator_;  // the same sequence in every standard library
};

class RotaryEmbeddingRandom : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingRandom, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingRandom, ::testing::Values(at::kCUDA), device_name);

void check_case(RandomCases& random, at::DeviceType device) {
  const Target target{device, random.dtype()};
  const RotaryCase c = random.next();
  const Strides grad_q_strides = random.strides();
  const Strides grad_k_strides = random.strides();
  SCOPED_TRACE(::testing::Message() << target << ", " << c);

  RotaryInputs in = make_inputs(c, target);
  for (at::Tensor* tensor : {&in.q, &in.k, &in.cos, &in.sin}) {
    tensor->requires_grad_();
  }
  const auto [q, k] = rotate_qk(in);
  expect_close_to_rounding(q, in, in.q);
  expect_close_to_rounding(k, in, in.k);
  expect_same_bits(rotate(in, in.q), q);

  // <Jx, y> = <x, J'y>, within the rounding errors of the elements of Jx and J'y.
  const at::Tensor grad_q = random_tensor(q.sizes(), target, grad_q_strides);
  const at::Tensor grad_k = random_tensor(k.sizes(), target, grad_k_strides);
  const TensorList found = gradients({q, k}, {in.q, in.k, in.cos, in.sin}, {grad_q, grad_k});
  const RotaryInputs back = backwards(in);
  const auto expect_adjoint = [&](const at::Tensor& x, const at::Tensor& y, const at::Tensor& g, const at::Tensor& gx) {
    const double tolerance =
        inner_product(rounding_bound(in, x), g.abs()) + inner_product(rounding_bound(back, g), x.abs());
    EXPECT_NEAR(inner_product(y, g), inner_product(x, gx), tolerance);
  };
  expect_adjoint(in.q, q, grad_q, found[0]);
  expect_adjoint(in.k, k, grad_k, found[1]);
  expect_table_gradients(found[2], found[3], scalar_table_gradients(in, {{grad_q, in.q}, {grad_k, in.k}}));
}

TEST_P(RotaryEmbeddingRandom, CallsMatchTheReference) {
  for_each_seed(200, [](uint64_t case_seed) {
    RandomCases random(case_seed);
    check_case(random, GetParam());
  });
}

}  // namespace
}  // namespace posenc::test
