#include "alibi_support.h"

#include <ATen/ATen.h>

#include <limits>

// The softmax with ALiBi for every dtype.
namespace posenc::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

INSTANTIATE_TEST_SUITE_P(Cpu, Alibi, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, Alibi, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(Alibi, SoftmaxIsExactHoweverFarTheQuery) {
  // Moving a query away from all keys adds the same constant to all distances of its row.
  for (const int64_t keys : {7, 64, 17000}) {
    SCOPED_TRACE(keys);
    AlibiCase c;
    c.q_len = 1;
    c.k_len = keys;
    AlibiInputs in = inputs(c);
    for (const auto& [near, far] :
         {std::pair<int64_t, int64_t>(keys - 1, int64_t{1} << 30), {0, -(int64_t{1} << 30)}}) {
      in.query_offset = near;
      const at::Tensor expected = softmax_of(in);
      expect_softmax(expected, in);
      in.query_offset = far;
      expect_same_bits(softmax_of(in), expected);
    }
  }
}

TEST_P(Alibi, MaskedKeysWeighNothingHoweverLowTheOthers) {
  AlibiCase c;
  c.q_len = c.k_len = 16;
  c.masked = c.causal = true;
  AlibiInputs in = inputs(c);
  in.scores = in.scores.clone().fill_(-60000);
  expect_softmax(softmax_of(in), in);
}

TEST_P(Alibi, SoftmaxOfAnyRowLength) {
  for (const int64_t keys : {1, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 2049, 4096, 8192, 16384, 16385, 40000}) {
    for (const bool flags : {false, true}) {
      SCOPED_TRACE(::testing::Message() << keys << (flags ? " keys, all flags" : " keys"));
      AlibiCase c;
      c.batch = 1;
      c.heads = 2;
      c.q_len = 2;
      c.k_len = keys;
      AlibiInputs in = inputs(c);
      // Slope 2^-12 gives weight to all keys of a row.
      in.slopes = on_device(at::tensor({0x1p-12F, 0.5F}));
      if (flags) {
        in.scale = 0.125;
        in.causal = true;
        in.key_padding_mask = random_mask(1, keys, GetParam().device);
        in.query_offset = keys - 3;
      }
      expect_softmax(softmax_of(in), in);
    }
  }
}

TEST_P(Alibi, SoftmaxOfUnalignedRowsIsTheSame) {
  for (const int64_t keys : {9, 1024, 2048, 16384, 16400}) {
    SCOPED_TRACE(keys);
    AlibiCase c;
    c.batch = c.heads = 1;
    c.q_len = 3;
    c.k_len = keys;
    c.strides = Strides::odd_offset;
    AlibiInputs in = inputs(c);
    expect_softmax(softmax_of(in), in);
    in.scores = in.scores.clone();
    expect_softmax(softmax_of(in), in);
  }
}

TEST_P(Alibi, SoftmaxOfLargeScoresDoesNotOverflow) {
  AlibiCase c;
  c.k_len = 33;
  AlibiInputs in = inputs(c);
  in.scores = in.scores * 10000;
  expect_softmax(softmax_of(in), in);
  in.scores = in.scores.clone().fill_(60000);
  expect_softmax(softmax_of(in), in);
}

TEST_P(Alibi, SoftmaxOfTheLowestScoresIsUniform) {
  if (dtype() == at::kHalf) {
    GTEST_SKIP() << "its lowest number does not swallow the bias in float32";
  }
  // Models fill masked scores with this value. The operator treats it like any other score.
  AlibiCase c;
  c.k_len = 16;
  AlibiInputs in = inputs(c);
  const double lowest = dtype() == at::kDouble ? std::numeric_limits<double>::lowest() : -0x1.fep127;
  in.scores = in.scores.clone().fill_(lowest);
  EXPECT_TRUE(softmax_of(in).eq(0.0625).all().item<bool>());
}

TEST_P(Alibi, SoftmaxTreatsMinusInfinityInScoresAsMasked) {
  AlibiCase c;
  c.k_len = 16;
  AlibiInputs in = inputs(c);
  in.scores.select(-1, 3).fill_(-kInfinity);
  const at::Tensor p = softmax_of(in);
  EXPECT_EQ(p.select(-1, 3).abs().max().item<double>(), 0);
  AlibiInputs masked = in;
  masked.scores = in.scores.clone();
  masked.scores.select(-1, 3).zero_();
  masked.key_padding_mask = at::zeros({c.batch, c.k_len}, at::kBool).to(device());
  masked.key_padding_mask->select(1, 3).fill_(true);
  expect_softmax(p, masked);
}

TEST_P(Alibi, SoftmaxOfRowsWithNothingVisibleIsZero) {
  for (const int64_t keys : {5, 64, 1024, 2048, 16384, 17000}) {
    SCOPED_TRACE(keys);
    AlibiCase c;
    c.heads = 2;
    c.q_len = 3;
    c.k_len = keys;
    AlibiInputs in = inputs(c);
    // key_padding_mask hides all keys of batch 1.
    in.key_padding_mask = at::zeros({c.batch, keys}, at::kBool).to(device());
    in.key_padding_mask->select(0, 1).fill_(true);
    const at::Tensor p = softmax_of(in);
    EXPECT_EQ(p.select(0, 1).to(at::kDouble).abs().max().item<double>(), 0);
    expect_softmax(p, in);
    // Causality hides all keys of queries 0 and 1, which are before the first key.
    in.key_padding_mask.reset();
    in.causal = true;
    in.query_offset = -2;
    const at::Tensor q = softmax_of(in);
    EXPECT_EQ(q.narrow(-2, 0, 2).to(at::kDouble).abs().max().item<double>(), 0);
    EXPECT_EQ(q.select(-2, 2).select(-1, 0).to(at::kDouble).min().item<double>(), 1);
    expect_softmax(q, in);
  }
}

TEST_P(Alibi, SoftmaxOfAllMaskedKeysIsZero) {
  AlibiInputs in = inputs();
  in.key_padding_mask = at::ones({2, 7}, at::kBool).to(device());
  EXPECT_EQ(softmax_of(in).to(at::kDouble).abs().max().item<double>(), 0);
}

}  // namespace
}  // namespace posenc::test
