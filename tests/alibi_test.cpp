#include "alibi_support.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace posenc::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---------------------------------------------------------------------------------------------------------------------
// Slopes: Press, Smith, Lewis 2022 (https://arxiv.org/abs/2108.12409), section 3; for head counts that are not powers
// of two, get_slopes of the authors (https://github.com/ofirpress/attention_with_linear_biases)

/// Expects float32 slopes that are `expected`, rounded once.
void expect_slopes(const at::Tensor& actual, const std::vector<double>& expected) {
  ASSERT_EQ(actual.scalar_type(), at::kFloat);
  ASSERT_EQ(actual.sizes(), at::IntArrayRef({static_cast<int64_t>(expected.size())}));
  for (size_t h = 0; h < expected.size(); ++h) {
    const double slope = actual[static_cast<int64_t>(h)].item<double>();
    EXPECT_NEAR(slope, expected[h], expected[h] * (unit_roundoff(at::kFloat) + 0x1p-50)) << "head " << h;
  }
}

TEST(AlibiSlopes, OfOneHead) {
  expect_slopes(posenc::alibi_slopes(1), {1.0 / 256});
}

TEST(AlibiSlopes, OfThreeHeads) {
  expect_slopes(posenc::alibi_slopes(3), {1.0 / 16, 1.0 / 256, 1.0 / 4});
}

TEST(AlibiSlopes, OfSixHeads) {
  expect_slopes(posenc::alibi_slopes(6), {1.0 / 4, 1.0 / 16, 1.0 / 64, 1.0 / 256, 1.0 / 2, 1.0 / 8});
}

TEST(AlibiSlopes, OfEightHeadsAreThoseOfThePaper) {
  expect_slopes(
      posenc::alibi_slopes(8), {1.0 / 2, 1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32, 1.0 / 64, 1.0 / 128, 1.0 / 256});
}

TEST(AlibiSlopes, OfTwelveHeads) {
  expect_slopes(
      posenc::alibi_slopes(12),
      {1.0 / 2, 1.0 / 4, 1.0 / 8, 1.0 / 16, 1.0 / 32, 1.0 / 64, 1.0 / 128, 1.0 / 256, 0.70710678118654752,
       0.35355339059327376, 0.17677669529663688, 0.088388347648318441});
}

TEST(AlibiSlopes, OfFortyHeads) {
  // 32 heads: powers of 2^(-1/4). 8 heads: odd powers of 2^(-1/8).
  const std::vector<double> fourths{0.84089641525371454, 0.70710678118654752, 0.59460355750136054, 0.5};
  std::vector<double> expected;
  expected.reserve(32);
  for (int h = 0; h < 32; ++h) {
    expected.push_back(std::ldexp(fourths[static_cast<size_t>(h % 4)], -(h / 4)));
  }
  const std::vector<double> eighths{0.91700404320467123, 0.77110541270397041, 0.64841977732550483, 0.54525386633262883};
  for (int h = 0; h < 8; ++h) {
    expected.push_back(std::ldexp(eighths[static_cast<size_t>(h % 4)], -(h / 4)));
  }
  expect_slopes(posenc::alibi_slopes(40), expected);
}

TEST(AlibiSlopes, OfPowersOfTwoEndAtMaxBias) {
  for (const double max_bias : {1.0, 8.0, 16.0, 10.5}) {
    for (const int64_t heads : {1, 2, 4, 16, 64, 128}) {
      const at::Tensor slopes = posenc::alibi_slopes(heads, max_bias);
      const double last = std::exp2(-max_bias);
      EXPECT_NEAR(slopes[heads - 1].item<double>(), last, last * 0x1p-23);
    }
  }
}

// The rule of the authors in float64, rounded once. Powers in float32 differ in the last bit.
TEST(AlibiSlopes, AreFloat64RoundedOnce) {
  for (const double max_bias : {8.0, 5.0, 12.5}) {
    for (int64_t heads = 1; heads <= 130; ++heads) {
      int64_t power = 1;
      while (2 * power <= heads) {
        power *= 2;
      }
      const at::Tensor expected = at::empty({heads}, at::kFloat);
      for (int64_t h = 0; h < heads; ++h) {
        const auto n = static_cast<double>(power);
        const double exponent =
            h < power ? static_cast<double>(h + 1) / n : static_cast<double>(2 * (h - power) + 1) / (2 * n);
        expected.data_ptr<float>()[h] = static_cast<float>(std::exp2(-max_bias * exponent));
      }
      SCOPED_TRACE(heads);
      expect_same_bits(posenc::alibi_slopes(heads, max_bias), expected);
    }
  }
}

TEST(AlibiSlopes, WithMaxBias) {
  expect_slopes(posenc::alibi_slopes(4, 4), {0.5, 0.25, 0.125, 0.0625});
  expect_slopes(posenc::alibi_slopes(3, 4), {0.25, 0.0625, 0.5});
}

TEST(AlibiSlopes, OfBadArgumentsAreErrors) {
  expect_error([] { posenc::alibi_slopes(0); }, {"num_heads", "0"});
  expect_error([] { posenc::alibi_slopes(-3); }, {"num_heads", "-3"});
  expect_error([] { posenc::alibi_slopes(8, -1); }, {"max_bias", "-1"});
  expect_error([] { posenc::alibi_slopes(8, std::nan("")); }, {"max_bias", "nan"});
  expect_error([] { posenc::alibi_slopes(8, std::numeric_limits<double>::infinity()); }, {"max_bias", "inf"});
}

// ---------------------------------------------------------------------------------------------------------------------
// A grid of shapes, strides and flags

/// Cases that each change one aspect of a default call. Row lengths include those around the vector lengths of every
/// dtype: 2, 4 and 8 elements (16 bytes) on a GPU, up to 16 floats on the CPU.
std::vector<AlibiCase> grid() {
  std::vector<AlibiCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(AlibiCase&)>& change) {
    AlibiCase c;
    c.name = name;
    change(c);
    cases.push_back(c);
  };
  add("Default", [](AlibiCase&) {});
  for (const int64_t keys : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257}) {
    add("Keys" + std::to_string(keys), [=](AlibiCase& c) { c.k_len = keys; });
    add("Square" + std::to_string(keys) + "Causal", [=](AlibiCase& c) {
      c.batch = c.heads = 1;
      c.q_len = std::min<int64_t>(keys, 40);
      c.k_len = keys;
      c.causal = true;
    });
  }
  for (const auto& [queries, keys] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {1, 12}, {3, 12}, {12, 3}, {9, 1}, {16, 8}, {8, 16}}) {
    const std::string sizes = std::to_string(queries) + "By" + std::to_string(keys);
    const auto change = [q = queries, k = keys](AlibiCase& c) { c.q_len = q, c.k_len = k; };
    add(sizes, change);
    add(sizes + "Causal", [=](AlibiCase& c) {
      change(c);
      c.causal = true;
    });
  }
  for (const int64_t offset : {-12, -3, 0, 1, 4, 100}) {
    const std::string name = "Offset" + std::string(offset < 0 ? "Minus" : "") + std::to_string(std::abs(offset));
    add(name, [=](AlibiCase& c) { c.query_offset = offset; });
    add(name + "Causal", [=](AlibiCase& c) { c.query_offset = offset, c.causal = true; });
    add(name + "CausalMasked", [=](AlibiCase& c) {
      c.query_offset = offset;
      c.causal = c.masked = true;
      c.k_len = 16;
    });
  }
  for (const double scale : {0.125, -2.0, 0.0, 3.7}) {
    add("Scale" + std::to_string(cases.size()), [=](AlibiCase& c) { c.scale = scale; });
  }
  for (int mask = 0; mask < kMaskStrides; ++mask) {
    for (const int64_t keys : {7, 16, 64}) {
      add("Mask" + std::to_string(mask) + "Keys" + std::to_string(keys), [=](AlibiCase& c) {
        c.masked = true;
        c.mask_strides = static_cast<MaskStrides>(mask);
        c.k_len = keys;
        c.scale = 0.5;
      });
    }
  }
  add("EveryOtherSlope", [](AlibiCase& c) { c.every_other_slope = true; });
  add("OneHead", [](AlibiCase& c) { c.heads = 1; });
  add("ManyHeads", [](AlibiCase& c) { c.heads = 70, c.batch = 1; });
  add("ManyBatches", [](AlibiCase& c) { c.heads = 1, c.batch = 70; });
  for (const bool batched : {true, false}) {
    const std::string suffix = batched ? "" : "OfThreeDimensions";
    for (int strides = batched ? 1 : 0; strides < kStrides; ++strides) {
      for (const int64_t keys : {7, 16}) {
        add("Strides" + std::to_string(strides) + "Keys" + std::to_string(keys) + suffix, [=](AlibiCase& c) {
          c.batched = batched;
          c.k_len = keys;
          c.strides = static_cast<Strides>(strides);
        });
      }
      add("Strides" + std::to_string(strides) + "Causal" + suffix, [=](AlibiCase& c) {
        c.batched = batched;
        c.q_len = c.k_len = 8;
        c.strides = static_cast<Strides>(strides);
        c.causal = true;
        c.masked = batched;
      });
    }
  }
  return cases;
}

using GridParam = std::tuple<Target, AlibiCase>;

class AlibiGrid : public ::testing::TestWithParam<GridParam> {
 protected:
  void SetUp() override {
    require_device(target().device);
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    inputs_ = make_alibi_inputs(std::get<1>(GetParam()), target());
  }

  const Target& target() const { return std::get<0>(GetParam()); }

  AlibiInputs inputs_;
};

TEST_P(AlibiGrid, BiasIsTheFormula) {
  const at::Tensor bias = bias_of(inputs_, target().dtype);
  EXPECT_EQ(bias.scalar_type(), target().dtype);
  EXPECT_EQ(bias.device(), inputs_.slopes.device());
  EXPECT_TRUE(bias.is_contiguous());
  expect_bias(bias, inputs_, inputs_.scores.size(-2), inputs_.scores.size(-1));
}

TEST_P(AlibiGrid, SumIsTheFormula) {
  expect_sum(add_of(inputs_), inputs_);
}

TEST_P(AlibiGrid, SumInPlaceHasTheSameBits) {
  // Expanded tensors cannot be written in place.
  at::Tensor scores =
      inputs_.scores.is_non_overlapping_and_dense() ? inputs_.scores.clone() : inputs_.scores.contiguous().clone();
  const at::Tensor expected = add_of(inputs_);
  posenc::alibi_add_(scores, inputs_.slopes, inputs_.causal, inputs_.query_offset);
  expect_same_bits(scores, expected);
}

TEST_P(AlibiGrid, SoftmaxIsTheFormula) {
  expect_softmax(softmax_of(inputs_), inputs_);
}

TEST_P(AlibiGrid, ResultsKeepADenseMemoryLayout) {
  for (const at::Tensor& y : {add_of(inputs_), softmax_of(inputs_)}) {
    EXPECT_EQ(y.strides(), at::empty_like(inputs_.scores).strides());
  }
}

std::string grid_name(const ::testing::TestParamInfo<GridParam>& info) {
  return std::string(at::toString(std::get<0>(info.param).dtype)) + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCPU)), ::testing::ValuesIn(grid())),
    grid_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCUDA)), ::testing::ValuesIn(grid())),
    grid_name);

// ---------------------------------------------------------------------------------------------------------------------
// Behaviour for every dtype

class Alibi : public TargetTest {
 protected:
  AlibiInputs inputs(const AlibiCase& c = AlibiCase()) const { return make_alibi_inputs(c, GetParam()); }
  at::Tensor on_device(const at::Tensor& tensor) const { return tensor.to(device()); }
};

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
