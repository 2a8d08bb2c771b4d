#include "alibi_support.h"

#include <posenc/alibi.h>

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace posenc::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---------------------------------------------------------------------------------------------------------------------
// Behaviour for every dtype

INSTANTIATE_TEST_SUITE_P(Cpu, Alibi, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, Alibi, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(Alibi, BiasOfThreeByFourByHand) {
  // The queries are at the positions of keys 1, 2 and 3.
  const at::Tensor slopes = on_device(at::tensor({0.5F, 2.0F}));
  const auto expect_values = [](const at::Tensor& actual, const std::vector<double>& numbers) {
    const at::Tensor expected = at::tensor(numbers, at::kDouble).view(actual.sizes());
    EXPECT_TRUE(actual.to(at::kCPU, at::kDouble).equal(expected)) << actual;
  };
  expect_values(
      posenc::alibi_bias(slopes, 3, 4, /*causal=*/false, dtype()),
      {-0.5, 0, -0.5, -1, -1, -0.5, 0, -0.5, -1.5, -1, -0.5, 0,  //
       -2,   0, -2,   -4, -4, -2,   0, -2,   -6,   -4, -2,   0});
  expect_values(
      posenc::alibi_bias(slopes, 3, 4, /*causal=*/true, dtype()).select(0, 0),
      {-0.5, 0, -kInfinity, -kInfinity, -1, -0.5, 0, -kInfinity, -1.5, -1, -0.5, 0});
}

TEST_P(Alibi, DefaultOffsetAlignsTheLastQueryWithTheLastKey) {
  const AlibiInputs in = inputs();
  for (const auto& [queries, keys] : std::vector<std::pair<int64_t, int64_t>>{{3, 9}, {9, 3}, {4, 4}}) {
    for (const bool causal : {false, true}) {
      expect_same_bits(
          posenc::alibi_bias(in.slopes, queries, keys, causal, dtype()),
          posenc::alibi_bias(in.slopes, queries, keys, causal, dtype(), keys - queries));
    }
  }
}

TEST_P(Alibi, DecodingIsTheLastRow) {
  AlibiCase c;
  c.q_len = c.k_len = 33;
  c.causal = true;
  const AlibiInputs all = inputs(c);
  AlibiInputs last = all;
  last.scores = all.scores.narrow(-2, 32, 1);
  expect_same_bits(bias_of(last, dtype()), bias_of(all, dtype()).narrow(-2, 32, 1));
  expect_same_bits(add_of(last), add_of(all).narrow(-2, 32, 1));
  expect_softmax(softmax_of(last), last);
}

TEST_P(Alibi, ChunkedPrefillIsTheWhole) {
  AlibiCase c;
  c.q_len = c.k_len = 24;
  c.causal = true;
  const AlibiInputs all = inputs(c);
  const at::Tensor sum = add_of(all);
  const at::Tensor softmax = softmax_of(all);
  for (const int64_t begin : {0, 7, 16}) {
    // Keys up to the end of the chunk: the default query_offset.
    const int64_t end = begin + 8;
    AlibiInputs chunk = all;
    chunk.scores = all.scores.narrow(-2, begin, 8).narrow(-1, 0, end);
    expect_same_bits(add_of(chunk), sum.narrow(-2, begin, 8).narrow(-1, 0, end));
    expect_softmax(softmax_of(chunk), chunk);
    // All keys, with an explicit query_offset.
    chunk.scores = all.scores.narrow(-2, begin, 8);
    chunk.query_offset = begin;
    expect_same_bits(add_of(chunk), sum.narrow(-2, begin, 8));
    expect_same_bits(softmax_of(chunk), softmax.narrow(-2, begin, 8));
  }
}

TEST_P(Alibi, AddIsTheSumWithTheBiasRoundedOnce) {
  // A bias in the dtype of the scores would be wrong: bfloat16 does not represent all multiples of 1/2 above 128.
  for (const int64_t keys : {257, 2048, 8192}) {
    SCOPED_TRACE(keys);
    AlibiCase c;
    c.batched = false;
    c.heads = 1;
    c.q_len = 4;
    c.k_len = keys;
    AlibiInputs in = inputs(c);
    in.slopes = on_device(at::tensor({0.5F}));
    for (const std::optional<int64_t>& offset : {std::optional<int64_t>(), std::optional<int64_t>(keys / 2)}) {
      in.query_offset = offset;
      expect_bias(bias_of(in, dtype()), in, c.q_len, c.k_len);
      expect_sum(add_of(in), in);
      expect_softmax(softmax_of(in), in);
    }
  }
}

TEST_P(Alibi, SumsHalfwayBetweenTwoNumbersAreRoundedToEven) {
  const double step = 2 * unit_roundoff(dtype());  // from 1 to the next larger number
  constexpr int64_t kKeys = 67;
  const at::Tensor columns = at::arange(kKeys, at::kDouble);
  AlibiInputs in = inputs();
  in.scores = on_device((columns.remainder(4) * step + 1).view({1, 1, kKeys})).to(in.scores.options());
  in.slopes = on_device(at::full({1}, -step / 2, at::kDouble)).to(in.slopes.options());
  in.query_offset = kKeys - 1;
  const at::Tensor exact = in.scores.to(at::kDouble) + on_device((kKeys - 1 - columns) * (step / 2));
  // For float64 inputs, `exact` is already rounded, as there is no wider dtype.
  expect_same_bits(add_of(in), exact.to(dtype()));
}

TEST_P(Alibi, DistancesBeyondAnyTableWork) {
  AlibiCase c;
  c.heads = 2;
  c.batch = 1;
  c.q_len = 3;
  c.k_len = 70'001;
  AlibiInputs in = inputs(c);
  in.slopes = on_device(at::tensor({0.25F, 0.00390625F}));
  for (const bool causal : {false, true}) {
    in.causal = causal;
    expect_bias(bias_of(in, dtype()), in, c.q_len, c.k_len);
    expect_sum(add_of(in), in);
    expect_softmax(softmax_of(in), in);
  }
}

TEST_P(Alibi, DistancesBeyondTheIntegersOfFloat32Work) {
  AlibiCase c;
  AlibiInputs in = inputs(c);
  // Slopes for which scores fit into float16, with a largest number of 65504.
  in.slopes = on_device(at::tensor({0x1p-25F, 0x1.8p-26F, 0x1p-30F}));
  for (const int64_t offset : {int64_t{1} << 25, (int64_t{1} << 31) - 6, 8 - (int64_t{1} << 31)}) {
    in.query_offset = offset;
    expect_bias(bias_of(in, dtype()), in, c.q_len, c.k_len);
    expect_sum(add_of(in), in);
  }
}

TEST_P(Alibi, ResultsLargerThanCachesAreTheSame) {
  // float32 and float64 results of 32 MiB or more bypass the CPU caches, but not in place and not for single heads.
  AlibiCase c;
  c.batched = false;
  c.q_len = 512;
  c.k_len = 5472;
  AlibiInputs in = inputs(c);
  ASSERT_GE(static_cast<int64_t>(in.scores.nbytes()), dtype() == at::kFloat ? 32 << 20 : 0);
  for (const bool causal : {false, true}) {
    for (const int64_t keys : {c.k_len, c.k_len - 1, c.k_len - 4}) {
      in.causal = causal;
      AlibiInputs part = in;
      part.scores = in.scores.narrow(-1, 0, keys);
      at::Tensor in_place = part.scores.clone();
      posenc::alibi_add_(in_place, in.slopes, causal);
      expect_same_bits(add_of(part), in_place);
      const at::Tensor bias = bias_of(part, dtype());
      part.slopes = in.slopes.narrow(0, 1, 1);
      part.scores = part.scores.narrow(0, 1, 1);
      expect_same_bits(bias.narrow(0, 1, 1), bias_of(part, dtype()));
    }
  }
}

TEST_P(Alibi, LargeScoresOfOneValueARowAreReadWithTheirStride) {
  AlibiCase c;
  c.batched = false;
  c.q_len = 512;
  c.k_len = 5472;
  c.strides = Strides::one_channel;
  const AlibiInputs in = inputs(c);
  ASSERT_EQ(in.scores.stride(-1), 0);
  expect_same_bits(add_of(in), posenc::alibi_add(in.scores.contiguous(), in.slopes));
}

TEST_P(Alibi, NanInScoresStaysInItsRow) {
  AlibiCase c;
  c.k_len = 16;
  AlibiInputs in = inputs(c);
  in.scores.select(0, 0).select(0, 0).select(0, 1).select(0, 5).fill_(std::nan(""));
  const at::Tensor p = softmax_of(in);
  EXPECT_EQ(p.isnan().sum().item<int64_t>(), 16);
  EXPECT_EQ(add_of(in).isnan().sum().item<int64_t>(), 1);
}

TEST_P(Alibi, LaterKeysWeighNothingEvenInARowOfNan) {
  for (const int64_t keys : {13, 16, 17000}) {
    AlibiCase c;
    c.batched = false;
    c.heads = 1;
    c.q_len = 8;
    c.k_len = keys;
    c.causal = true;
    AlibiInputs in = inputs(c);
    in.query_offset = 0;
    in.scores.select(-1, 0).fill_(std::nan(""));
    const at::Tensor p = softmax_of(in)[0].to(at::kCPU, at::kDouble);
    const at::Tensor later = at::ones({c.q_len, keys}, at::kBool).triu(1);
    EXPECT_TRUE(p.isnan().equal(later.logical_not())) << keys;
    EXPECT_EQ(p.masked_fill(later.logical_not(), 0).abs().max().item<double>(), 0) << keys;
  }
}

TEST_P(Alibi, MaskedScoresDoNotMatter) {
  AlibiCase c;
  c.k_len = 16;
  AlibiInputs in = inputs(c);
  in.key_padding_mask = at::zeros({c.batch, c.k_len}, at::kBool).to(device());
  in.key_padding_mask->select(1, 5).fill_(true);
  const at::Tensor expected = softmax_of(in);
  for (const double value : {kInfinity, std::nan(""), 1e4}) {
    in.scores.select(-1, 5).fill_(value);
    expect_same_bits(softmax_of(in), expected);
  }
}

TEST_P(Alibi, ResultsAreTheSameBitsEachTime) {
  AlibiCase c;
  c.k_len = 1030;
  c.causal = true;
  const AlibiInputs in = inputs(c);
  const at::Tensor sum = add_of(in);
  const at::Tensor softmax = softmax_of(in);
  for (int i = 0; i < 3; ++i) {
    expect_same_bits(add_of(in), sum);
    expect_same_bits(softmax_of(in), softmax);
  }
}

TEST_P(Alibi, EmptyTensorsWork) {
  for (const int empty : {0, 1, 2, 3}) {
    AlibiCase c;
    c.batch = empty == 0 ? 0 : c.batch;
    c.heads = empty == 1 ? 0 : c.heads;
    c.q_len = empty == 2 ? 0 : c.q_len;
    c.k_len = empty == 3 ? 0 : c.k_len;
    for (const bool flags : {false, true}) {
      SCOPED_TRACE(::testing::Message() << c);
      c.causal = c.masked = flags;
      const AlibiInputs in = inputs(c);
      EXPECT_EQ(bias_of(in, dtype()).sizes(), at::IntArrayRef({c.heads, c.q_len, c.k_len}));
      EXPECT_EQ(add_of(in).sizes(), in.scores.sizes());
      EXPECT_EQ(softmax_of(in).sizes(), in.scores.sizes());
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// In place

TEST_P(Alibi, InPlaceReturnsItsArgumentAndBumpsItsVersion) {
  const AlibiInputs in = inputs();
  at::Tensor scores = in.scores.clone();
  const auto version = scores._version();
  const at::Tensor returned = posenc::alibi_add_(scores, in.slopes);
  EXPECT_TRUE(returned.is_same(scores));
  EXPECT_EQ(scores._version(), version + 1);
  expect_sum(scores, in);
}

TEST_P(Alibi, InPlaceWritesThroughViews) {
  AlibiCase c;
  c.q_len = c.k_len = 12;
  const AlibiInputs in = inputs(c);
  for (int view = 0; view < 4; ++view) {
    SCOPED_TRACE(view);
    const at::Tensor stored = in.scores.clone();
    at::Tensor part = view == 0 ? stored.narrow(-1, 3, 5)
        : view == 1             ? stored.transpose(-1, -2)
        : view == 2             ? stored.slice(-1, 0, 12, 2)
                                : stored.transpose(0, 1).select(1, 1);
    AlibiInputs before = in;
    before.scores = part.clone();
    const at::Tensor others = stored.clone();
    posenc::alibi_add_(part, in.slopes);
    expect_sum(part, before);
    // Elements outside of the view are unchanged.
    at::Tensor other_part = view == 0 ? others.narrow(-1, 3, 5)
        : view == 1                   ? others.transpose(-1, -2)
        : view == 2                   ? others.slice(-1, 0, 12, 2)
                                      : others.transpose(0, 1).select(1, 1);
    other_part.copy_(part);
    expect_same_bits(stored, others);
  }
}

TEST_P(Alibi, InPlaceOnOverlappingMemoryIsAnError) {
  const AlibiInputs in = inputs();
  at::Tensor expanded = in.scores.narrow(0, 0, 1).expand({2, -1, -1, -1});
  expect_error([&] { posenc::alibi_add_(expanded, in.slopes); }, {"scores", "a place of their own"});
  at::Tensor keys = in.scores.narrow(-1, 0, 1).expand({-1, -1, -1, 7});
  expect_error([&] { posenc::alibi_add_(keys, in.slopes); }, {"scores", "a place of their own"});
}

TEST_P(Alibi, InPlaceOnSlopesMemoryIsAnError) {
  if (dtype() != at::kFloat) {
    GTEST_SKIP() << "slopes and scores are of different dtypes";
  }
  at::Tensor scores = on_device(at::zeros({1, 2, 3, 4}));
  const at::Tensor slopes = scores.view({-1}).narrow(0, 4, 2);
  expect_error([&] { posenc::alibi_add_(scores, slopes); }, {"slopes", "overlap"});
}

}  // namespace
}  // namespace posenc::test
