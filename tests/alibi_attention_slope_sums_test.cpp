#include "alibi_attention_support.h"

#include <ATen/ATen.h>

#include <cmath>

namespace posenc::test {
namespace {

/// Sums `[4, B, Hq, Sq]` by a scalar loop, and the sums of magnitudes that bound their rounding errors.
struct ScalarSums {
  at::Tensor values, magnitudes;
};

ScalarSums scalar_sums(const AttentionInputs& in, const at::Tensor& grad, const at::Tensor& lse) {
  const auto on_cpu = [](const at::Tensor& x) { return x.to(at::kCPU, at::kDouble).contiguous(); };
  const at::Tensor q = on_cpu(in.q), k = on_cpu(in.k), v = on_cpu(in.v), dout = on_cpu(grad), all = on_cpu(lse);
  const at::Tensor slopes = on_cpu(in.slopes);
  const int64_t heads = q.size(2), group = heads / k.size(2), dim = q.size(3);
  const double scale = in.options.scale().value_or(1 / std::sqrt(static_cast<double>(dim)));
  const int64_t offset = in.options.query_offset().value_or(k.size(1) - q.size(1));
  ScalarSums sums{at::zeros({4, q.size(0), heads, q.size(1)}, at::kDouble), {}};
  sums.magnitudes = at::zeros_like(sums.values);
  const auto dot = [dim](const at::Tensor& a, const at::Tensor& b) {
    double sum = 0;
    for (int64_t c = 0; c < dim; ++c) {
      sum += a.const_data_ptr<double>()[c] * b.const_data_ptr<double>()[c];
    }
    return sum;
  };
  for (int64_t b = 0; b < q.size(0); ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < q.size(1); ++i) {
        for (int64_t j = 0; j < k.size(1); ++j) {
          const int64_t ahead = j - (i + offset);
          if (in.options.causal() && ahead > 0) {
            continue;
          }
          const double distance = std::abs(static_cast<double>(ahead));
          const double score = scale * dot(q[b][i][h], k[b][j][h / group]) - slopes[h].item<double>() * distance;
          const double p = std::exp(score - all[b][h][i].item<double>());
          const double dp = dot(dout[b][i][h], v[b][j][h / group]);
          const double terms[] = {p, p * distance, p * dp, p * dp * distance};
          // Every term has the errors of the score and of dP, each a sum of `dim` products.
          const double most = (dout[b][i][h].abs() * v[b][j][h / group].abs()).sum().item<double>();
          const double sizes[] = {p, p * distance, p * most, p * most * distance};
          for (int64_t sum = 0; sum < 4; ++sum) {
            sums.values[sum][b][h][i] += terms[sum];
            sums.magnitudes[sum][b][h][i] +=
                sizes[sum] * (2 + std::abs(score) + std::abs(slopes[h].item<double>() * distance));
          }
        }
      }
    }
  }
  return sums;
}

class AlibiAttentionSlopeSums : public TargetTest {
 protected:
  AttentionInputs inputs(const AttentionCase& c) const { return make_attention_inputs(c, GetParam()); }

  static at::Tensor lse_of(const AttentionInputs& in) { return std::get<1>(attend_with_lse(in)); }

  void expect_sums(const AttentionInputs& in, const at::Tensor& lse) const {
    const at::Tensor grad = at::randn(in.q.sizes(), at::kDouble).to(device(), dtype());
    const at::Tensor sums = slope_sums(in, grad, lse);
    EXPECT_EQ(sums.scalar_type(), at::kDouble);
    const ScalarSums expected = scalar_sums(in, grad, lse);
    // Sums of `dim` products and over the keys: float32, or float64 for float64.
    const double roundoff = unit_roundoff(dtype() == at::kDouble ? at::kDouble : at::kFloat);
    const double terms = static_cast<double>(in.q.size(-1) + in.k.size(1));
    const at::Tensor excess = (sums.cpu() - expected.values).abs() - terms * roundoff * expected.magnitudes;
    EXPECT_LE(excess.max().item<double>(), 0);
  }
};

TEST_P(AlibiAttentionSlopeSums, EqualTheScalarLoop) {
  for (const bool causal : {true, false}) {
    AttentionCase c;
    c.causal = causal;
    const AttentionInputs in = inputs(c);
    expect_sums(in, lse_of(in));
  }
}

TEST_P(AlibiAttentionSlopeSums, TakeTheLogSumExpOfMoreKeysThanTheirs) {
  AttentionCase c;
  c.query_offset = 9;  // all queries are after all keys
  const AttentionInputs in = inputs(c);
  expect_sums(in, lse_of(in) + 2);
}

TEST_P(AlibiAttentionSlopeSums, AreZeroWhereNothingIsSeen) {
  AttentionCase c;
  c.causal = true;
  c.query_offset = -3;  // the first three queries see no key
  const AttentionInputs in = inputs(c);
  const at::Tensor sums = slope_sums(in, at::ones_like(in.q), lse_of(in));
  EXPECT_TRUE(sums.narrow(-1, 0, 3).eq(0).all().item<bool>());
  EXPECT_TRUE(sums.select(0, 0).narrow(-1, 3, 2).gt(0).all().item<bool>());
}

TEST_P(AlibiAttentionSlopeSums, OfPartsOfTheKeysAddUp) {
  AttentionCase c;
  c.q_len = c.k_len = 8;
  const AttentionInputs whole = inputs(c);
  const at::Tensor grad = at::randn(whole.q.sizes(), at::kDouble).to(device(), dtype());
  const at::Tensor lse = lse_of(whole);
  at::Tensor total = at::zeros({4, c.batch, c.q_heads, c.q_len}, whole.q.options().dtype(at::kDouble));
  for (const int64_t begin : {0, 3}) {
    AttentionInputs part = whole;
    const int64_t count = begin == 0 ? 3 : 5;
    part.k = whole.k.narrow(1, begin, count);
    part.v = whole.v.narrow(1, begin, count);
    part.options.query_offset(-begin);
    total += slope_sums(part, grad, lse);
  }
  const double tolerance = 64 * unit_roundoff(dtype() == at::kDouble ? at::kDouble : at::kFloat);
  EXPECT_TRUE(at::allclose(total, slope_sums(whole, grad, lse), tolerance, tolerance));
}

TEST_P(AlibiAttentionSlopeSums, RefuseWhatTheyCannotRead) {
  const AttentionInputs in = inputs(AttentionCase());
  const at::Tensor lse = lse_of(in);
  AttentionInputs packed = in;
  packed.q = in.q[0];
  expect_error([&] { slope_sums(packed, in.q, lse); }, {"posenc::alibi_attention_slope_sums: expected q of shape"});
  expect_error([&] { slope_sums(in, in.k, lse); }, {"posenc::alibi_attention_slope_sums: expected grad_out of"});
  expect_error([&] { slope_sums(in, in.q, lse[0]); }, {"posenc::alibi_attention_slope_sums: expected lse of"});
}

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttentionSlopeSums, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttentionSlopeSums, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

}  // namespace
}  // namespace posenc::test
