#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <limits>

// Attention on a CPU at the edges of blocks of query rows and of tiles of keys, and beyond the distance from which
// probabilities are zero.
namespace posenc::test {
namespace {

class AlibiAttentionTiles : public ::testing::TestWithParam<std::tuple<Target, AttentionCase>> {
 protected:
  AttentionInputs inputs() const { return make_attention_inputs(std::get<1>(GetParam()), std::get<0>(GetParam())); }
};

/// Blocks have 96 rows; tiles have 256 keys in the forward pass and 128 in the backward pass.
std::vector<AttentionCase> cases() {
  std::vector<AttentionCase> all;
  const auto add = [&all](const std::string& name, const std::function<void(AttentionCase&)>& change) {
    for (const bool causal : {false, true}) {
      AttentionCase c;
      c.batch = 1;
      c.q_heads = c.k_heads = 1;
      c.head_dim = 16;
      c.causal = causal;
      change(c);
      c.name = name + (causal ? "Causal" : "");
      all.push_back(c);
    }
  };
  for (const int64_t length : {95, 96, 97, 127, 128, 129, 192, 193, 255, 256, 257}) {
    add("Length" + std::to_string(length), [=](AttentionCase& c) { c.q_len = c.k_len = length; });
  }
  for (const int64_t keys : {127, 128, 129, 255, 256, 257}) {
    add("OneQueryOf" + std::to_string(keys), [=](AttentionCase& c) { c.q_len = 1, c.k_len = keys; });
    add("MoreKeysThanQueries" + std::to_string(keys), [=](AttentionCase& c) { c.q_len = 97, c.k_len = keys; });
    add("MoreQueriesThanKeys" + std::to_string(keys), [=](AttentionCase& c) { c.q_len = keys, c.k_len = 33; });
  }
  for (const int64_t head_dim : {1, 15, 17, 33, 80, 128}) {
    add("HeadSize" + std::to_string(head_dim), [=](AttentionCase& c) {
      c.q_len = c.k_len = 130;
      c.head_dim = head_dim;
    });
  }
  add("GroupedQueries", [](AttentionCase& c) { c.q_len = c.k_len = 130, c.q_heads = 6, c.k_heads = 2; });
  add("ManyHeads", [](AttentionCase& c) { c.batch = 3, c.q_len = c.k_len = 40, c.q_heads = 12, c.k_heads = 6; });
  for (const int64_t offset : {-140, -100, 50, 300, 1 << 20}) {
    add("Offset" + std::string(offset < 0 ? "Minus" : "") + std::to_string(std::abs(offset)), [=](AttentionCase& c) {
      c.q_len = c.k_len = 130;
      c.query_offset = offset;
    });
  }
  add("Lengths", [](AttentionCase& c) {
    c.batch = 3;
    c.q_len = c.k_len = 260;
    c.seqlens_q = {260, 100, 3};
    c.seqlens_k = {257, 129, 250};
  });
  add("LengthsWithOffset", [](AttentionCase& c) {
    c.batch = 2;
    c.q_len = c.k_len = 260;
    c.query_offset = 7;
    c.seqlens_k = {257, 129};
  });
  for (const double slope : {4.0, 64.0, -1.0}) {
    add("Slope" + std::to_string(all.size()), [=](AttentionCase& c) {
      c.q_len = c.k_len = 400;
      c.largest_slope = slope;
    });
  }
  return all;
}

TEST_P(AlibiAttentionTiles, ResultsAreTheFormula) {
  expect_scalar_results(inputs());
}

TEST_P(AlibiAttentionTiles, ResultsAreTheSameBitsForEveryNumberOfThreads) {
  const AttentionInputs in = attention_leaves(inputs());
  const auto all = [&](int threads) {
    const int before = at::get_num_threads();
    at::set_num_threads(threads);
    const auto [out, lse] = attend_with_lse(in);
    TensorList results = gradients({out, lse}, {in.q, in.k, in.v, in.slopes}, {at::ones_like(out), at::ones_like(lse)});
    at::set_num_threads(before);
    results.push_back(out);
    results.push_back(lse);
    return results;
  };
  const TensorList expected = all(1);
  for (const int threads : {2, 3, 16}) {
    const TensorList actual = all(threads);
    for (size_t i = 0; i < expected.size(); ++i) {
      expect_same_bits(actual[i], expected[i]);
    }
  }
}

std::string case_name(const ::testing::TestParamInfo<std::tuple<Target, AttentionCase>>& info) {
  return std::get<1>(info.param).name + "_" + at::toString(std::get<0>(info.param).dtype);
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiAttentionTiles,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCPU)), ::testing::ValuesIn(cases())),
    case_name);

class AlibiAttentionFarKeys : public TargetTest {
 protected:
  /// A call in which the probabilities of most keys are zero because of their distance.
  AttentionInputs inputs(bool causal) const {
    AttentionCase c;
    c.batch = 1;
    c.q_len = c.k_len = 400;
    c.q_heads = c.k_heads = 1;
    c.causal = causal;
    c.scale = 1;
    AttentionInputs in = make_attention_inputs(c, GetParam());
    in.slopes = at::full({1}, dtype() == at::kDouble ? 16 : 2, at::kFloat);
    return in;
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttentionFarKeys, ::testing::ValuesIn(targets(at::kCPU)), target_name);

TEST_P(AlibiAttentionFarKeys, WithALargeScoreHaveTheirProbability) {
  for (const bool causal : {false, true}) {
    AttentionInputs in = inputs(causal);
    // The score of the last query and the first key is about as large as the bias of -slope * 399.
    in.q = in.q.clone();
    in.k = in.k.clone();
    const double root = std::sqrt(399 * in.slopes.item<double>() / 8);
    in.q[0][399].fill_(root);
    in.k[0][0].fill_(root);
    const auto [out, lse] = attend_with_lse(in);
    EXPECT_GT((out[0][399] - in.v[0][399]).abs().max().item<double>(), 0.01);
    expect_scalar_results(in);
  }
}

TEST_P(AlibiAttentionFarKeys, OfNaNReachTheRowsThatSeeThem) {
  for (const bool causal : {false, true}) {
    AttentionInputs in = inputs(causal);
    in.k = in.k.clone();
    in.k[0][5].fill_(std::numeric_limits<double>::quiet_NaN());
    const at::Tensor out = attend(in);
    EXPECT_TRUE(out[0].slice(0, 5).isnan().all().item<bool>());
    EXPECT_EQ(out[0].slice(0, 0, 5).isnan().any().item<bool>(), !causal);
  }
}

TEST_P(AlibiAttentionFarKeys, WithInfiniteValuesReachTheRowsThatSeeThem) {
  for (const bool causal : {false, true}) {
    AttentionInputs in = inputs(causal);
    in.v = in.v.clone();
    in.v[0][5].select(-1, 3).fill_(std::numeric_limits<double>::infinity());
    const at::Tensor out = attend(in)[0].select(-1, 3).squeeze(-1);
    EXPECT_TRUE(out.slice(0, 5).isinf().all().item<bool>());
    EXPECT_EQ(out.slice(0, 0, 5).isinf().any().item<bool>(), !causal);
  }
}

}  // namespace
}  // namespace posenc::test
