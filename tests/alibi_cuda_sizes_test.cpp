#include "alibi_cuda_fixtures.h"
#include "gradcheck.h"

#include <ATen/ATen.h>

#include <cmath>

// The operators of ALiBi on a GPU with tensors of many elements.
namespace posenc::test {
namespace {

TEST_F(AlibiCuda, MoreThan65535QueriesOrKeysWork) {
  constexpr int64_t kMany = 65'537;
  const auto check = [](const std::function<void(AlibiCase&)>& change) {
    AlibiCase c;
    c.batch = c.heads = 1;
    c.q_len = 1;
    c.k_len = 5;
    change(c);
    SCOPED_TRACE(::testing::Message() << c);
    const AlibiInputs in = leaves(c);
    const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
    expect_bias(bias_of(in, at::kFloat), in, c.q_len, c.k_len);
    const at::Tensor sum = add_of(in);
    expect_sum(sum, in);
    expect_slope_gradient(gradients({sum}, {in.slopes}, {grad})[0], scalar_add_gradients(in, grad), 1e-6);
    const at::Tensor softmax = softmax_of(in);
    expect_softmax(softmax, in);
    const TensorList found = gradients({softmax}, {in.scores, in.slopes}, {grad});
    expect_softmax_gradients(found[0], found[1], in, grad);
  };
  check([](AlibiCase& c) { c.q_len = kMany; });
  check([](AlibiCase& c) { c.k_len = kMany; });
}

TEST_F(AlibiCuda, MoreThan65535HeadsOrBatchesWork) {
  const auto check = [](int64_t batch, int64_t heads) {
    AlibiCase c;
    c.batch = batch;
    c.heads = heads;
    c.q_len = 2;
    c.k_len = 3;
    c.causal = true;
    SCOPED_TRACE(::testing::Message() << c);
    const AlibiInputs in = leaves(c);
    const at::Tensor grad = random_tensor(in.scores.sizes(), kTarget);
    expect_bias(bias_of(in, at::kFloat), in, c.q_len, c.k_len);
    const at::Tensor sum = add_of(in);
    expect_sum(sum, in);
    const TensorList of_sum = gradients({sum}, {in.scores, in.slopes}, {grad});
    const AlibiGradients expected = scalar_add_gradients(in, grad);
    expect_within(of_sum[0], expected.scores, at::zeros({}, at::kDouble));
    expect_slope_gradient(of_sum[1], expected, 1e-6);
    const AlibiGradients of_one = scalar_add_gradients(in, at::ones_like(grad));
    expect_slope_gradient(
        gradients({add_of(in)}, {in.slopes}, {at::ones({}, kTarget.device).expand_as(sum)})[0], of_one, 1e-6);
    const at::Tensor softmax = softmax_of(in);
    expect_softmax(softmax, in);
    const TensorList found = gradients({softmax}, {in.scores, in.slopes}, {grad});
    expect_softmax_gradients(found[0], found[1], in, grad);
  };
  check(70'000, 1);
  check(1, 70'000);
  check(257, 300);  // 77100 batches times heads
}

TEST_F(AlibiCuda, SlopeGradientsOf16384TokensAreThoseOfFloat64) {
  if (const std::string reason = too_large(24); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  constexpr int64_t kTokens = 16384;
  const auto options = at::TensorOptions(at::kFloat).device(at::kCUDA);
  const at::Tensor positions = at::arange(kTokens, options.dtype(at::kDouble));
  const at::Tensor distances = (positions.unsqueeze(0) - positions.unsqueeze(1)).abs();
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor slopes = posenc::alibi_slopes(2).to(at::kCUDA).requires_grad_();
    const at::Tensor grad = at::rand({2, kTokens, kTokens}, options).to(dtype);
    const at::Tensor bias = posenc::alibi_bias(slopes, kTokens, kTokens, /*causal=*/false, dtype);
    const at::Tensor of_bias = gradients({bias}, {slopes}, {grad})[0];
    const at::Tensor of_sum = gradients({posenc::alibi_add(bias.detach(), slopes)}, {slopes}, {grad})[0];
    for (int64_t h = 0; h < 2; ++h) {
      const double expected = -(grad[h].to(at::kDouble) * distances).sum().item<double>();
      EXPECT_NEAR(of_bias[h].item<double>(), expected, 1e-5 * std::abs(expected));
      EXPECT_NEAR(of_sum[h].item<double>(), expected, 1e-5 * std::abs(expected));
    }
  }
}

/// A call for `count` rows of one head of `in`.
AlibiInputs rows_of(const AlibiInputs& in, int64_t head, int64_t begin, int64_t count) {
  AlibiInputs part = in;
  part.scores = in.scores.detach().narrow(1, head, 1).narrow(2, begin, count);
  part.slopes = in.slopes.detach().narrow(0, head, 1);
  part.query_offset = in.scores.size(-1) - in.scores.size(-2) + begin;
  return part;
}

TEST_F(AlibiCuda, MoreThanTwoToThe31ElementsWork) {
  if (const std::string reason = too_large(40); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  const auto options = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  struct Shape {
    int64_t heads;
    int64_t tokens;
  };
  // Softmax rows that are kept in registers, ones that are read twice, and more than 2^31 elements in a single head.
  for (const Shape& shape : {Shape{33, 8192}, Shape{3, 32768}, Shape{1, 46344}}) {
    for (const bool causal : {false, true}) {
      SCOPED_TRACE(::testing::Message() << shape.tokens << " tokens" << (causal ? ", causal" : ""));
      AlibiInputs in;
      in.causal = causal;
      in.scale = 0.5;
      in.scores = at::randn({1, shape.heads, shape.tokens, shape.tokens}, options).requires_grad_();
      ASSERT_GT(in.scores.numel(), int64_t{1} << 31);
      in.slopes = posenc::alibi_slopes(shape.heads).to(at::kCUDA).requires_grad_();
      const std::vector<int64_t> begins{0, shape.tokens / 2 - 2, shape.tokens - 4};
      const auto rows = [](const at::Tensor& y, int64_t head, int64_t begin) {
        return y.narrow(-3, head, 1).narrow(-2, begin, 4);
      };
      const auto for_some_rows = [&](const std::function<void(int64_t, int64_t, const AlibiInputs&)>& check) {
        for (const int64_t head : {int64_t{0}, shape.heads - 1}) {
          for (const int64_t begin : begins) {
            check(head, begin, rows_of(in, head, begin, 4));
          }
        }
      };
      {
        const at::Tensor bias = bias_of(in, at::kBFloat16).detach();
        for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
          expect_bias(rows(bias, head, begin), part, 4, shape.tokens);
        });
      }
      {
        const at::Tensor sum = add_of(in);
        for_some_rows(
            [&](int64_t head, int64_t begin, const AlibiInputs& part) { expect_sum(rows(sum, head, begin), part); });
        const at::Tensor ones = at::ones({}, options).expand_as(sum);
        const TensorList found = gradients({sum}, {in.scores, in.slopes}, {ones});
        for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
          const at::Tensor visible = scalar_bias(part).isinf().logical_not();
          expect_same_bits(rows(found[0], head, begin), visible.to(at::kBFloat16));
        });
        // Sum of |i - j| over all pairs of n tokens; causal: half of it.
        const double n = static_cast<double>(shape.tokens);
        const double distance = (causal ? 0.5 : 1) * n * (n * n - 1) / 3;
        const at::Tensor dense = gradients({sum}, {in.slopes}, {ones.contiguous()})[0];
        for (int64_t h = 0; h < shape.heads; ++h) {
          EXPECT_NEAR(found[1][h].item<double>(), -distance, 1e-6 * distance);
          EXPECT_NEAR(dense[h].item<double>(), -distance, 1e-6 * distance);
        }
      }
      const at::Tensor softmax = softmax_of(in);
      for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
        expect_softmax(rows(softmax, head, begin), part);
      });
      const at::Tensor grad = at::randn(softmax.sizes(), options);
      const TensorList found = gradients({softmax}, {in.scores}, {grad});
      for_some_rows([&](int64_t head, int64_t begin, const AlibiInputs& part) {
        expect_softmax_gradients(rows(found[0], head, begin), at::Tensor(), part, rows(grad, head, begin));
      });
    }
  }
}

}  // namespace
}  // namespace posenc::test
