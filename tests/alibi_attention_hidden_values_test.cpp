#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>

#include <limits>

// NaN and infinity in hidden queries, keys and values, such as those in the unused part of a KV cache.
namespace posenc::test {
namespace {

constexpr double kNotFinite[] = {
    std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
    -std::numeric_limits<double>::infinity()};

class AlibiAttentionHiddenValues : public TargetTest {
 protected:
  AttentionInputs inputs(const AttentionCase& c) const { return make_attention_inputs(c, GetParam()); }

  /// Whether attention is fused: 16-bit dtypes on a GPU.
  bool is_fused() const { return GetParam().device == at::kCUDA && c10::elementSize(dtype()) == 2; }
  static constexpr const char* kOfFused =
      "fused attention multiplies hidden values in a tile of keys by a probability of 0";

  /// Gradients of q, k, v and slopes for `grad`, the gradient of out; then out.
  static TensorList everything(const AttentionInputs& inputs, const at::Tensor& grad) {
    const AttentionInputs in = attention_leaves(inputs);
    const at::Tensor out = attend(in);
    TensorList results = gradients({out}, {in.q, in.k, in.v, in.slopes}, {grad});
    results.push_back(out.detach());
    return results;
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttentionHiddenValues, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttentionHiddenValues, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(AlibiAttentionHiddenValues, BehindTheLengthsReachNothing) {
  AttentionCase c;
  c.head_dim = 64;
  c.q_len = c.k_len = 24;
  c.seqlens_q = {5, 24};
  c.seqlens_k = {1, 20};
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/true);  // for the same bits of fused attention
  for (const auto& [causal, offset] : std::vector<std::pair<bool, std::optional<int64_t>>>{
           {false, std::nullopt}, {true, std::nullopt}, {false, 0}, {true, 0}}) {
    c.causal = causal;
    c.query_offset = offset;
    const AttentionInputs in = inputs(c);
    const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
    const TensorList expected = everything(in, grad);
    for (const double value : kNotFinite) {
      AttentionInputs spoilt = in;
      for (at::Tensor* x : {&spoilt.q, &spoilt.k, &spoilt.v}) {
        *x = x->clone();
      }
      at::Tensor spoilt_grad = grad.clone();
      for (int64_t b = 0; b < 2; ++b) {
        spoilt.q[b].slice(0, c.seqlens_q[b]).fill_(value);
        spoilt_grad[b].slice(0, c.seqlens_q[b]).fill_(value);
        spoilt.k[b].slice(0, c.seqlens_k[b]).fill_(value);
        spoilt.v[b].slice(0, c.seqlens_k[b]).fill_(value);
      }
      const TensorList actual = everything(spoilt, spoilt_grad);
      for (size_t i = 0; i < expected.size(); ++i) {
        expect_same_bits(actual[i], expected[i]);
      }
    }
  }
  at::globalContext().setDeterministicAlgorithms(deterministic, /*warn_only=*/false);
}

TEST_P(AlibiAttentionHiddenValues, BehindACausalMaskReachNoEarlierRow) {
  if (is_fused()) {
    GTEST_SKIP() << kOfFused;
  }
  AttentionCase c;
  c.head_dim = 5;
  c.q_len = c.k_len = 9;
  c.causal = true;
  constexpr int64_t kSpoilt = 6;
  const AttentionInputs in = inputs(c);
  at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
  grad.slice(1, kSpoilt).zero_();
  AttentionInputs before = in;
  for (at::Tensor* x : {&before.q, &before.k, &before.v}) {
    *x = x->slice(1, 0, kSpoilt);
  }
  const TensorList expected = everything(before, grad.slice(1, 0, kSpoilt));
  for (const double value : kNotFinite) {
    for (const bool in_keys : {false, true}) {
      SCOPED_TRACE(c10::str(value, in_keys ? " in k" : " in v"));
      AttentionInputs spoilt = in;
      at::Tensor& x = in_keys ? spoilt.k : spoilt.v;
      x = x.clone();
      x.select(1, kSpoilt).fill_(value);
      const TensorList actual = everything(spoilt, grad);
      const auto early = [&](const at::Tensor& y) { return y.slice(1, 0, kSpoilt); };
      // Outputs and gradients of queries that do not see the key are sums of at most nine terms, each below 8, in
      // another order than the expected ones.
      const double bound = 8 * 9 * unit_roundoff(table_dtype(dtype()));
      for (const size_t i : {size_t{0}, size_t{4}}) {
        EXPECT_TRUE(at::allclose(
            early(actual[i]).to(at::kDouble), expected[i].to(at::kDouble), 4 * unit_roundoff(dtype()), bound))
            << i;
      }
      // A visible value reaches the outputs.
      EXPECT_TRUE(actual[4].slice(1, kSpoilt).isfinite().logical_not().any().item<bool>() || in_keys);
    }
  }
}

TEST_P(AlibiAttentionHiddenValues, InVisibleValuesReachTheirChannelOfTheRowsThatSeeThem) {
  if (is_fused()) {
    GTEST_SKIP() << kOfFused;
  }
  AttentionCase c;
  c.head_dim = 5;
  c.batch = 1;
  c.q_len = c.k_len = 6;
  c.q_heads = c.k_heads = 1;
  c.causal = true;
  AttentionInputs in = inputs(c);
  for (const double value : kNotFinite) {
    AttentionInputs spoilt = in;
    spoilt.v = in.v.clone();
    spoilt.v.select(1, 3).select(-1, 2).fill_(value);
    at::Tensor expected = attend(in);
    expected.slice(1, 3).select(-1, 2).fill_(value);
    EXPECT_TRUE(at::allclose(
        attend(spoilt).to(at::kDouble), expected.to(at::kDouble), 4 * unit_roundoff(dtype()),
        8 * unit_roundoff(table_dtype(dtype())), /*equal_nan=*/true));
  }
}

TEST_P(AlibiAttentionHiddenValues, InHiddenKeysReachNoGradientThroughSoftcap) {
  if (is_fused()) {
    GTEST_SKIP() << kOfFused;
  }
  AttentionCase c;
  c.head_dim = 5;
  c.q_len = c.k_len = 9;
  c.causal = true;
  c.softcap = 2;
  const AttentionInputs in = inputs(c);
  at::Tensor grad = at::ones_like(in.q);
  grad.select(1, 8).zero_();
  const at::Tensor expected = everything(in, grad)[0];
  for (const double value : kNotFinite) {
    AttentionInputs spoilt = in;
    spoilt.k = in.k.clone();
    spoilt.k.select(1, 8).fill_(value);
    EXPECT_TRUE(at::allclose(everything(spoilt, grad)[0].slice(1, 0, 8), expected.slice(1, 0, 8))) << value;
  }
}

TEST_P(AlibiAttentionHiddenValues, OutsideOfAWindowReachNoRow) {
  if (is_fused()) {
    GTEST_SKIP() << kOfFused;
  }
  AttentionCase c;
  c.head_dim = 5;
  c.batch = 1;
  c.q_len = c.k_len = 9;
  c.q_heads = c.k_heads = 1;
  constexpr int64_t kSpoilt = 4;
  for (const auto& [left, right] : std::vector<std::pair<std::optional<int64_t>, std::optional<int64_t>>>{
           {2, 1}, {0, 0}, {2, std::nullopt}, {std::nullopt, 1}}) {
    c.window_left = left;
    c.window_right = right;
    const AttentionInputs in = inputs(c);
    // Query i sees the key if -left <= key - i <= right.
    const int64_t first = right.has_value() ? kSpoilt - *right : 0;
    const int64_t end = left.has_value() ? kSpoilt + *left + 1 : c.q_len;
    for (const double value : kNotFinite) {
      AttentionInputs spoilt = in;
      spoilt.v = in.v.clone();
      spoilt.v.select(1, kSpoilt).select(-1, 2).fill_(value);
      at::Tensor expected = attend(in);
      expected.slice(1, first, end).select(-1, 2).fill_(value);
      EXPECT_TRUE(at::allclose(
          attend(spoilt).to(at::kDouble), expected.to(at::kDouble), 4 * unit_roundoff(dtype()),
          8 * unit_roundoff(table_dtype(dtype())), /*equal_nan=*/true))
          << value << ", rows " << first << " to " << end;
      // Queries that do not see the key have the gradient of a call with another finite key.
      spoilt.v = in.v;
      spoilt.k = in.k.clone();
      spoilt.k.select(1, kSpoilt).fill_(value);
      at::Tensor grad = at::ones_like(in.q);
      grad.slice(1, first, end).zero_();
      const at::Tensor actual = everything(spoilt, grad)[0];
      const at::Tensor wanted = everything(in, grad)[0];
      for (const auto& [from, to] : std::vector<std::pair<int64_t, int64_t>>{{0, first}, {end, c.q_len}}) {
        EXPECT_TRUE(at::allclose(
            actual.slice(1, from, to).to(at::kDouble), wanted.slice(1, from, to).to(at::kDouble),
            4 * unit_roundoff(dtype()), 64 * unit_roundoff(table_dtype(dtype()))));
      }
    }
  }
}

TEST_P(AlibiAttentionHiddenValues, BehindTheLengthsReachNoSecondDerivative) {
  AttentionCase c;
  c.head_dim = 5;
  c.q_len = c.k_len = 6;
  c.seqlens_q = {2, 6};
  c.seqlens_k = {1, 5};
  const AttentionInputs in = attention_leaves(inputs(c));
  const TensorList of{in.q, in.k, in.v};
  const at::Tensor out = attend(in);
  const TensorList first = gradients({out}, of, {at::ones_like(out)}, /*create_graph=*/true);
  const TensorList cotangents = random_like(first);
  const TensorList expected = gradients(first, of, cotangents);
  for (const double value : kNotFinite) {
    TensorList spoilt;
    for (const at::Tensor& cotangent : cotangents) {
      spoilt.push_back(cotangent.clone());
    }
    for (int64_t b = 0; b < 2; ++b) {
      spoilt[0][b].slice(0, c.seqlens_q[b]).fill_(value);
      spoilt[1][b].slice(0, c.seqlens_k[b]).fill_(value);
      spoilt[2][b].slice(0, c.seqlens_k[b]).fill_(value);
    }
    const TensorList actual = gradients(first, of, spoilt);
    for (size_t i = 0; i < expected.size(); ++i) {
      expect_same_bits(actual[i], expected[i]);
    }
  }
}

/// Sequences of three and four tokens are one batch, in which the shorter one is padded.
TEST_P(AlibiAttentionHiddenValues, OfTheNextPackedSequenceReachNothing) {
  AttentionCase c;
  c.head_dim = 5;
  c.q_len = c.k_len = 7;
  c.cu_seqlens_q = {0, 3, 7};
  for (const bool causal : {false, true}) {
    c.causal = causal;
    const AttentionInputs in = inputs(c);
    const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
    const TensorList expected = everything(in, grad);
    for (const double value : kNotFinite) {
      AttentionInputs spoilt = in;
      at::Tensor spoilt_grad = grad.clone();
      for (at::Tensor* x : {&spoilt.q, &spoilt.k, &spoilt.v, &spoilt_grad}) {
        *x = x->clone();
        x->slice(0, 3).fill_(value);
      }
      const TensorList actual = everything(spoilt, spoilt_grad);
      for (const size_t i :
           {size_t{0}, size_t{1}, size_t{2}, size_t{4}}) {  // not the gradient of slopes, a sum over both sequences
        expect_same_bits(actual[i].slice(0, 0, 3), expected[i].slice(0, 0, 3));
      }
    }
  }
}

TEST_P(AlibiAttentionHiddenValues, InTheFirstValueReachNoRowBeforeIt) {
  AttentionCase c;
  c.head_dim = 5;
  c.q_len = 4;
  c.k_len = 2;
  c.causal = true;  // two queries are before all keys
  AttentionInputs in = inputs(c);
  for (const double value : kNotFinite) {
    in.v = in.v.clone();
    in.v.select(1, 0).fill_(value);
    EXPECT_TRUE(attend(in).slice(1, 0, 2).eq(0).all().item<bool>()) << value;
  }
}

TEST_P(AlibiAttentionHiddenValues, InVisibleKeysAndValuesReachNoRowBehindTheLengths) {
  AttentionCase c;
  c.q_len = c.k_len = 3;
  c.seqlens_q = {1, 3};
  c.seqlens_k = {2, 3};
  for (const int64_t head_dim : {5, 64}) {
    for (const bool causal : {false, true}) {
      c.head_dim = head_dim;
      c.causal = causal;
      const AttentionInputs in = inputs(c);
      const at::Tensor grad = at::ones_like(in.q);
      for (const double value : kNotFinite) {
        for (const bool in_keys : {false, true}) {
          SCOPED_TRACE(c10::str("head size ", head_dim, ", causal ", causal, ", ", value, in_keys ? " in k" : " in v"));
          AttentionInputs spoilt = in;
          at::Tensor& x = in_keys ? spoilt.k : spoilt.v;
          x = x.clone();
          x[0][0].fill_(value);
          const TensorList actual = everything(spoilt, grad);
          EXPECT_TRUE(in_keys || !actual[4][0][0].isfinite().all().item<bool>());
          for (const size_t i : {size_t{0}, size_t{4}}) {  // the gradient of q, and the result
            EXPECT_TRUE(actual[i][0].slice(0, 1).eq(0).all().item<bool>()) << actual[i];
          }
          // The other sequence is unchanged.
          const TensorList expected = everything(in, grad);
          for (const size_t i : {size_t{0}, size_t{1}, size_t{2}, size_t{4}}) {
            EXPECT_TRUE(at::allclose(actual[i][1], expected[i][1])) << i;
          }
        }
      }
    }
  }
}

TEST_P(AlibiAttentionHiddenValues, NaNInAVisibleQueryReachesTheSlopeGradientOfItsHeadAlone) {
  AttentionCase c;
  c.q_len = c.k_len = 24;
  c.seqlens_q = {5, 24};
  c.seqlens_k = {7, 20};
  for (const int64_t head_dim : {5, 64}) {
    c.head_dim = head_dim;
    AttentionInputs in = inputs(c);
    const at::Tensor grad = at::ones_like(in.q);
    const at::Tensor expected = everything(in, grad)[3];
    in.q = in.q.clone();
    in.q[1][3][2].fill_(std::numeric_limits<double>::quiet_NaN());
    const at::Tensor actual = everything(in, grad)[3];
    EXPECT_TRUE(actual[2].isnan().item<bool>()) << actual;
    for (const int64_t head : {0, 1, 3}) {
      EXPECT_TRUE(at::allclose(actual[head], expected[head])) << "head " << head;
    }
  }
}

TEST_P(AlibiAttentionHiddenValues, InTheUnusedPartOfACacheReachNothing) {
  AttentionCase c;
  c.head_dim = 64;
  c.q_len = 1;
  c.k_len = 256;
  c.causal = true;
  c.query_offset = 40;
  const AttentionInputs in = inputs(c);
  const at::Tensor expected = attend(in);
  AttentionInputs spoilt = in;
  spoilt.k = in.k.clone();
  spoilt.v = in.v.clone();
  spoilt.k.slice(1, 41).fill_(std::numeric_limits<double>::quiet_NaN());
  spoilt.v.slice(1, 41).fill_(std::numeric_limits<double>::quiet_NaN());
  expect_same_bits(attend(spoilt), expected);
}

}  // namespace
}  // namespace posenc::test
