#include "gradcheck.h"
#include "rotary_embedding_cuda_fixtures.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

// rotary_embedding on a GPU with tensors of many elements.
namespace posenc::test {
namespace {

TEST_F(RotaryEmbeddingCuda, MoreThan65535OfAnySizeWork) {
  constexpr int64_t kMany = 65'537;
  const auto check = [](const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.batch = c.tokens = c.q_heads = c.k_heads = 1;
    c.head_dim = c.rotary_dim = 4;
    c.spare_rows = 0;
    change(c);
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = inputs(c);
    const auto [q, k] = rotate_qk(in);
    expect_close_to_rounding(q, in, in.q);
    expect_close_to_rounding(k, in, in.k);
  };
  check([](RotaryCase& c) { c.batch = kMany; });
  check([](RotaryCase& c) { c.tokens = kMany; });
  check([](RotaryCase& c) { c.batch = kMany, c.axes = 2, c.positions = PositionShape::per_batch; });
  check([](RotaryCase& c) { c.q_heads = kMany; });
  check([](RotaryCase& c) { c.k_heads = kMany; });
  check([](RotaryCase& c) { c.head_dim = c.rotary_dim = 2 * kMany; });
  check([](RotaryCase& c) { c.packed = true, c.tokens = kMany; });
}

TEST_F(RotaryEmbeddingCuda, TablesOfMoreThan65535RowsHaveGradients) {
  RotaryCase c;
  c.batch = 1;
  c.tokens = 65'537;
  c.q_heads = c.k_heads = 1;
  c.head_dim = c.rotary_dim = 4;
  RotaryInputs in = inputs(c);
  in.cos.requires_grad_();
  in.sin.requires_grad_();
  const at::Tensor grad = random_tensor(in.q.sizes(), kTarget);
  const TensorList found = gradients({rotate(in, in.q)}, {in.cos, in.sin}, {grad});
  // Each row is read by one token, so the expected gradients are the formula in tensor operations.
  const auto half = [](const at::Tensor& x, int64_t i) {
    return x.detach().cpu().to(at::kDouble).view({-1, 2, 2}).select(1, i);
  };
  const at::Tensor dcos = half(grad, 0) * half(in.q, 0) + half(grad, 1) * half(in.q, 1);
  const at::Tensor dsin = half(grad, 1) * half(in.q, 0) - half(grad, 0) * half(in.q, 1);
  const at::Tensor bound = at::full({}, 4 * unit_roundoff(at::kFloat) * 64, at::kDouble);
  expect_within(found[0].narrow(0, 0, c.tokens), dcos, bound);
  expect_within(found[1].narrow(0, 0, c.tokens), dsin, bound);
}

TEST_F(RotaryEmbeddingCuda, MoreThanTwoToThe31ElementsWork) {
  if (const std::string reason = too_large(24); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  constexpr int64_t heads = 16;
  constexpr int64_t head_dim = 128;
  constexpr int64_t tokens = (int64_t{1} << 31) / (heads * head_dim) + 3;
  const Target target{at::kCUDA, at::kBFloat16};
  const auto options = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  for (const bool head_major : {false, true}) {
    SCOPED_TRACE(head_major ? "head major" : "token major");
    at::Tensor x = head_major ? at::empty({1, heads, tokens, head_dim}, options).transpose(1, 2)
                              : at::empty({1, tokens, heads, head_dim}, options);
    ASSERT_GT(x.numel(), int64_t{1} << 31);
    // A block of random tokens, repeated with a prime period that has no common factor with any grid size.
    constexpr int64_t period = 4099;
    const at::Tensor block = random_tensor({1, period, heads, head_dim}, target);
    for (int64_t begin = 0; begin < tokens; begin += period) {
      const int64_t count = std::min(period, tokens - begin);
      x.narrow(1, begin, count).copy_(block.narrow(1, 0, count));
    }
    RotaryInputs in;
    in.cos = at::randn({1009, head_dim / 2}).to(at::kCUDA);
    in.sin = at::randn({1009, head_dim / 2}).to(at::kCUDA);
    const at::Tensor positions = at::arange(tokens, options.dtype(at::kLong)).remainder(1009);
    in.positions = positions;
    x.requires_grad_();
    const at::Tensor y = rotate(in, x);
    const auto expect_rotated = [&](const at::Tensor& actual, const at::Tensor& from, bool conjugate) {
      // First, middle and last tokens; the last are beyond 2^31 elements.
      for (const int64_t begin : {int64_t{0}, tokens / 2 - 8, tokens - 16}) {
        RotaryInputs part = in;
        part.conjugate = conjugate;
        part.positions = positions.narrow(0, begin, 16);
        expect_close_to_rounding(actual.narrow(1, begin, 16), part, from.narrow(1, begin, 16));
      }
    };
    expect_rotated(y, x, false);
    {
      const at::NoGradGuard no_grad;
      RotaryInputs by_axes = in;
      by_axes.positions = positions.expand({3, tokens});
      for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
        by_axes.pair_axes.push_back(pair % 3);
      }
      EXPECT_TRUE(at::equal(rotate(by_axes, x), y));
      at::Tensor in_place = x.detach().clone();
      posenc::rotary_embedding_(in_place, in.cos, in.sin, in.positions);
      EXPECT_TRUE(at::equal(in_place, y));
    }
    const at::Tensor grad = at::ones({}, options).expand_as(y);
    expect_rotated(gradients({y}, {x}, {grad})[0], grad, true);
  }
}

}  // namespace
}  // namespace posenc::test
