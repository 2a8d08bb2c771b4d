#include "gradcheck.h"
#include "support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

/// Arguments on the meta device, with the strides that `c` describes.
RotaryInputs meta_inputs(const RotaryCase& c, at::ScalarType dtype = at::kFloat) {
  return make_inputs(c, {at::kMeta, dtype});
}

TEST(RotaryEmbeddingMeta, OutputsHaveTheShapeDtypeAndStridesOfTheCpu) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    for (int strides = 0; strides < kStrides; ++strides) {
      RotaryCase c;
      c.head_dim = 24;
      c.q_strides = c.k_strides = static_cast<Strides>(strides);
      SCOPED_TRACE(::testing::Message() << dtype << ", " << c);
      const auto [q, k] = rotate_qk(meta_inputs(c, dtype));
      const auto [cpu_q, cpu_k] = rotate_qk(make_inputs(c, {at::kCPU, dtype}));
      for (const auto& [meta, cpu] : {std::pair(q, cpu_q), std::pair(k, cpu_k)}) {
        EXPECT_TRUE(meta.is_meta());
        EXPECT_EQ(meta.sizes(), cpu.sizes());
        EXPECT_EQ(meta.strides(), cpu.strides());
        EXPECT_EQ(meta.scalar_type(), cpu.scalar_type());
      }
    }
  }
}

TEST(RotaryEmbeddingMeta, OneTensorHasItsShape) {
  const RotaryInputs in = meta_inputs(RotaryCase());
  const at::Tensor y = rotate(in, in.q);
  EXPECT_TRUE(y.is_meta());
  EXPECT_EQ(y.sizes(), in.q.sizes());
}

TEST(RotaryEmbeddingMeta, PositionsNeedNoData) {
  RotaryInputs in = meta_inputs(RotaryCase());
  in.positions = at::empty({2, 5}, at::TensorOptions(at::kLong).device(at::kMeta));
  EXPECT_EQ(rotate(in, in.q).sizes(), in.q.sizes());
}

TEST(RotaryEmbeddingMeta, GradientsHaveTheShapesOfTheirInputs) {
  RotaryCase c;
  c.head_dim = 24;
  const RotaryInputs in = meta_inputs(c);
  TensorList leaves;
  for (const at::Tensor& tensor : {in.q, in.k, in.cos, in.sin}) {
    leaves.push_back(tensor.detach().requires_grad_());
  }
  const auto [q, k] = posenc::rotary_embedding_qk(leaves[0], leaves[1], leaves[2], leaves[3]);
  const TensorList found = gradients({q, k}, leaves, {at::empty_like(q), at::empty_like(k)});
  for (size_t i = 0; i < leaves.size(); ++i) {
    EXPECT_TRUE(found[i].is_meta());
    EXPECT_EQ(found[i].sizes(), leaves[i].sizes());
    EXPECT_EQ(found[i].scalar_type(), leaves[i].scalar_type());
  }
}

TEST(RotaryEmbeddingMeta, BadArgumentsAreTheErrorsOfTheCpu) {
  const auto expect_same_error = [](const std::function<void(RotaryInputs&)>& spoil, const std::string& part) {
    for (const at::DeviceType device : {at::kCPU, at::kMeta}) {
      RotaryInputs in = make_inputs(RotaryCase(), {device, at::kFloat});
      spoil(in);
      expect_error([&] { rotate_qk(in); }, {"posenc::rotary_embedding_qk: ", part});
    }
  };
  expect_same_error(
      [](RotaryInputs& in) { in.q = in.q[0][0]; }, "expected q of shape [B, S, H, D] or [T, H, D], got [4, 16]");
  expect_same_error([](RotaryInputs& in) { in.k = in.k.to(at::kHalf); }, "expected k of the dtype of q");
  expect_same_error([](RotaryInputs& in) { in.q = in.q.narrow(-1, 0, 8), in.k = in.k.narrow(-1, 0, 8); }, "got 16");
  expect_same_error(
      [](RotaryInputs& in) { in.cos = in.cos.narrow(0, 0, 3), in.sin = in.sin.narrow(0, 0, 3); }, "at least 5 rows");
  expect_same_error(
      [](RotaryInputs& in) { in.positions = at::zeros({5}, in.q.options()); }, "expected positions of dtype");
}

}  // namespace
}  // namespace posenc::test
