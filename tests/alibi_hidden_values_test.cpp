#include "alibi_support.h"
#include "gradcheck.h"

#include <posenc/reference.h>

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

namespace posenc::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// NaN and infinity. Hidden ones reach no result; visible ones reach the same results as in tensor operations.
class AlibiHiddenValues : public TargetTest {
 protected:
  AlibiInputs inputs(int64_t keys, bool flags, Strides strides = Strides::dense) const {
    AlibiCase c;
    c.batch = 2;
    c.heads = 2;
    c.q_len = 6;
    c.k_len = keys;
    c.strides = strides;
    c.causal = c.masked = flags;
    if (flags) {
      c.query_offset = keys / 2;
    }
    return make_alibi_inputs(c, GetParam());
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiHiddenValues, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiHiddenValues, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

const double kSpecials[] = {std::nan(""), kInfinity, -kInfinity};

TEST_P(AlibiHiddenValues, OfScoresReachNoProbabilityAndNoGradient) {
  for (const int64_t keys : {7, 16, 520, 4104, 17000}) {
    for (const Strides strides : {Strides::dense, Strides::every_other}) {
      const AlibiInputs in = inputs(keys, true, strides);
      const at::Tensor hidden = scalar_bias(in).isinf().to(device());
      const at::Tensor grad = random_tensor(in.scores.sizes(), GetParam());
      const auto run = [&](double value) {
        AlibiInputs spoilt = in;
        spoilt.scores = in.scores.masked_fill(hidden, value);
        spoilt = with_alibi_grad(spoilt, true, true);
        const at::Tensor y = softmax_of(spoilt);
        TensorList results = gradients({y}, {spoilt.scores, spoilt.slopes}, {grad});
        results.push_back(y.detach());
        return results;
      };
      const TensorList expected = run(0);
      for (const double value : kSpecials) {
        SCOPED_TRACE(::testing::Message() << keys << " keys, " << strides_name(strides) << ", " << value);
        const TensorList found = run(value);
        for (size_t i = 0; i < found.size(); ++i) {
          expect_same_bits(found[i], expected[i]);
        }
      }
    }
  }
}

TEST_P(AlibiHiddenValues, OfCausalScoresReachNoSumAndNoGradient) {
  for (const int64_t keys : {7, 16, 520}) {
    AlibiInputs in = inputs(keys, true);
    in.key_padding_mask.reset();
    const at::Tensor hidden = scalar_bias(in).isinf().to(device());
    const at::Tensor expected = add_of(in);
    const at::Tensor grad = random_tensor(in.scores.sizes(), GetParam());
    const auto slopes_of = [&](const at::Tensor& cotangent) {
      const AlibiInputs leaves = with_alibi_grad(in, true, true);
      return gradients({add_of(leaves)}, {leaves.scores, leaves.slopes}, {cotangent});
    };
    const TensorList expected_gradients = slopes_of(grad.masked_fill(hidden, 0));
    for (const double value : kSpecials) {
      SCOPED_TRACE(::testing::Message() << keys << " keys, " << value);
      AlibiInputs spoilt = in;
      spoilt.scores = in.scores.masked_fill(hidden, value);
      expect_same_bits(add_of(spoilt), expected);
      const TensorList found = slopes_of(grad.masked_fill(hidden, value));
      expect_same_bits(found[0], expected_gradients[0]);
      expect_same_bits(found[1], expected_gradients[1]);
    }
  }
}

/// Expects NaN and infinities of both signs at the same elements as in `expected`.
void expect_same_specials(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor a = actual.cpu();
  const at::Tensor b = expected.cpu();
  EXPECT_TRUE(a.isnan().equal(b.isnan()))
      << a.isnan().sum().item<int64_t>() << " NaN, expected " << b.isnan().sum().item<int64_t>();
  EXPECT_TRUE(a.isposinf().equal(b.isposinf()));
  EXPECT_TRUE(a.isneginf().equal(b.isneginf()));
}

/// The same arguments on the CPU.
AlibiInputs on_cpu(const AlibiInputs& in) {
  AlibiInputs result = in;
  result.scores = in.scores.cpu();
  result.slopes = in.slopes.cpu();
  if (in.key_padding_mask) {
    result.key_padding_mask = in.key_padding_mask->cpu();
  }
  return result;
}

void expect_specials_of_tensor_operations(const AlibiInputs& in, at::ScalarType dtype) {
  const AlibiInputs cpu = on_cpu(in);
  {
    SCOPED_TRACE("alibi_bias");
    expect_same_specials(
        bias_of(in, dtype),
        reference::alibi_bias(
            cpu.slopes, cpu.scores.size(-2), cpu.scores.size(-1), cpu.causal, dtype, cpu.query_offset));
  }
  {
    SCOPED_TRACE("alibi_add");
    const at::Tensor expected = reference::alibi_add(cpu.scores, cpu.slopes, cpu.causal, cpu.query_offset);
    expect_same_specials(add_of(in), expected);
    at::Tensor in_place = in.scores.clone();
    expect_same_specials(posenc::alibi_add_(in_place, in.slopes, in.causal, in.query_offset), expected);
  }
  {
    SCOPED_TRACE("alibi_softmax");
    const at::Tensor expected =
        reference::alibi_softmax(cpu.scores, cpu.slopes, cpu.scale, cpu.causal, cpu.key_padding_mask, cpu.query_offset);
    // In tensor operations NaN also reaches the keys that causality hides.
    const at::Tensor hidden = scalar_bias(in).isinf();
    expect_same_specials(softmax_of(in).cpu().masked_fill(hidden, 0), expected.masked_fill(hidden, 0));
  }
}

TEST_P(AlibiHiddenValues, OfExpandedGradientsOfRowsThatSeeNoKeyReachNoSlope) {
  for (const int64_t keys : {0, 7, 520}) {
    AlibiInputs in = inputs(keys, true);
    in.query_offset = -2;  // the first two queries are before all keys
    in = with_alibi_grad(in, false, true);
    const at::Tensor y = add_of(in);
    at::Tensor rows = random_tensor({2, 2, 6, 1}, GetParam());
    rows.slice(2, 0, 2).zero_();
    const auto gradient = [&] { return gradients({y}, {in.slopes}, {rows.expand_as(y)})[0]; };
    const at::Tensor expected = gradient();
    for (const double value : kSpecials) {
      rows.slice(2, 0, 2).fill_(value);
      expect_same_bits(gradient(), expected);
    }
  }
}

// A conversion that rounds by integer addition to the bits may overflow into the sign.
TEST_P(AlibiHiddenValues, NanSlopesOfAnyBitsStayNan) {
  const std::vector<int32_t> bits{0x7fc00000, 0x7fffffff, -1, 0x7f800001, -0x7fffff, -0x400000};
  for (const int64_t keys : {1, 7, 64, 5000}) {
    AlibiCase c;
    c.batch = 1;
    c.heads = static_cast<int64_t>(bits.size()) + 1;
    c.q_len = 3;
    c.k_len = keys;
    AlibiInputs in = make_alibi_inputs(c, GetParam());
    const at::Tensor slopes = at::cat({at::tensor(bits, at::kInt).view(at::kFloat), at::ones({1})});
    ASSERT_EQ(slopes.isnan().sum().item<int64_t>(), c.heads - 1);
    in.slopes = slopes.to(device());
    SCOPED_TRACE(keys);
    EXPECT_EQ(bias_of(in, dtype()).isnan().sum().item<int64_t>(), 3 * keys * (c.heads - 1));
    EXPECT_EQ(add_of(in).isnan().sum().item<int64_t>(), 3 * keys * (c.heads - 1));
    EXPECT_EQ(softmax_of(in).isnan().sum().item<int64_t>(), 3 * keys * (c.heads - 1));
    expect_specials_of_tensor_operations(in, dtype());
  }
}

TEST_P(AlibiHiddenValues, InfiniteSlopesGiveWhatTensorOperationsDo) {
  for (const double value : {kInfinity, -kInfinity}) {
    for (const bool causal : {false, true}) {
      SCOPED_TRACE(::testing::Message() << value << (causal ? " causal" : ""));
      AlibiInputs in = inputs(9, false);
      in.causal = causal;
      in.query_offset = 2;  // every query has a key at distance zero
      in.slopes = in.slopes.clone();
      in.slopes.select(0, 1).fill_(value);
      expect_specials_of_tensor_operations(in, dtype());
    }
  }
}

TEST_P(AlibiHiddenValues, VisibleScoresPropagate) {
  for (const double value : kSpecials) {
    for (const bool causal : {false, true}) {
      for (const int64_t keys : {9, 64, 5000}) {
        SCOPED_TRACE(::testing::Message() << value << (causal ? " causal " : " ") << keys);
        AlibiInputs in = inputs(keys, false);
        in.causal = causal;
        in.scores = in.scores.clone();
        in.scores.select(0, 1).select(0, 0).select(0, 2).select(0, 1).fill_(value);
        expect_specials_of_tensor_operations(in, dtype());
      }
    }
  }
}

// NaN scores in half and bfloat16 with all bits of the fraction set.
TEST_P(AlibiHiddenValues, NanScoresOfAnyBitsStayNan) {
  if (dtype() != at::kHalf && dtype() != at::kBFloat16) {
    GTEST_SKIP() << "nothing is rounded";
  }
  AlibiInputs in = inputs(64, false);
  const auto quiet = static_cast<int16_t>(0x7fff);
  in.scores = at::full(in.scores.sizes(), quiet, at::kShort).view(dtype()).to(device());
  ASSERT_TRUE(in.scores.isnan().all().item<bool>());
  EXPECT_TRUE(add_of(in).isnan().all().item<bool>());
  EXPECT_TRUE(softmax_of(in).isnan().all().item<bool>());
}

TEST_P(AlibiHiddenValues, VisibleIncomingGradientsPropagateWithinTheirRowAndHead) {
  for (const int64_t keys : {9, 64, 17000}) {
    for (const double value : {std::nan(""), kInfinity}) {
      SCOPED_TRACE(::testing::Message() << keys << " keys, " << value);
      const AlibiInputs in = with_alibi_grad(inputs(keys, false), true, true);
      const at::Tensor grad = random_tensor(in.scores.sizes(), GetParam());
      at::Tensor spoilt = grad.clone();
      // The key at distance 0, which has the largest probability: the product is not with zero.
      spoilt.select(0, 1).select(0, 1).select(0, 2).select(0, keys - 4).fill_(value);
      const auto run = [&](const at::Tensor& y, const at::Tensor& cotangent) {
        return gradients({y}, {in.scores, in.slopes}, {cotangent});
      };
      const at::Tensor p = softmax_of(in);
      const TensorList expected = run(p, grad);
      const TensorList found = run(p, spoilt);
      const auto row = [](const at::Tensor& x) { return x.select(0, 1).select(0, 1).select(0, 2); };
      EXPECT_FALSE(row(found[0]).select(0, keys - 4).isfinite().item<bool>());
      at::Tensor others = found[0].clone();
      row(others).copy_(row(expected[0]));
      expect_same_bits(others, expected[0]);
      EXPECT_FALSE(found[1][1].isfinite().item<bool>());
      expect_same_bits(found[1][0], expected[1][0]);

      const at::Tensor of_sum = run(add_of(in), spoilt)[1];
      EXPECT_FALSE(of_sum[1].isfinite().item<bool>());
      EXPECT_TRUE(of_sum[0].isfinite().item<bool>());
    }
  }
}

}  // namespace
}  // namespace posenc::test
