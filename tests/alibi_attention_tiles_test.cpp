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

/// Blocks have 96 rows; tiles have 256 keys in the forward pass and 128 in the backward pass. Up to four queries are
/// computed in parts of at least 256 keys.
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
  const std::vector<std::pair<std::optional<int64_t>, std::optional<int64_t>>> windows{
      {0, 0}, {1, std::nullopt}, {std::nullopt, 3}, {95, 64}, {128, 10}};
  for (const auto& window : windows) {
    const auto add_window = [&add, &window](
                                const std::string& name, const std::function<void(AttentionCase&)>& change) {
      const auto side = [](const std::optional<int64_t>& keys) { return keys ? std::to_string(*keys) : "All"; };
      add("Window" + side(window.first) + "To" + side(window.second) + name, [&window, &change](AttentionCase& c) {
        c.window_left = window.first;
        c.window_right = window.second;
        c.q_len = c.k_len = 200;
        change(c);
      });
    };
    add_window("", [](AttentionCase&) {});
    add_window("OfMoreKeys", [](AttentionCase& c) { c.q_len = 97, c.k_len = 389; });
    add_window("WithOffset", [](AttentionCase& c) { c.q_len = 131, c.k_len = 270, c.query_offset = 33; });
    add_window("BeforeTheFirstKey", [](AttentionCase& c) { c.query_offset = -110; });
    add_window("OfLengthsWithSoftcapAndSlopesOfSequences", [](AttentionCase& c) {
      c.batch = 3;
      c.q_len = 133, c.k_len = 261;
      c.q_heads = 2;
      c.seqlens_q = {133, 100, 3};
      c.seqlens_k = {257, 129, 261};
      c.softcap = 0.75;
      c.slopes_of_sequences = true;
    });
    add_window("OfFewQueries", [](AttentionCase& c) { c.q_len = 3, c.k_len = 700, c.query_offset = 500; });
  }
  for (const double softcap : {0.25, 30.0}) {
    const std::string name = "Softcap" + std::to_string(static_cast<int>(softcap));
    add(name, [=](AttentionCase& c) { c.q_len = c.k_len = 200, c.softcap = softcap, c.scale = 2; });
    add(name + "OfUnevenSizes", [=](AttentionCase& c) {
      c.q_len = 99;
      c.k_len = 130;
      c.head_dim = 17;
      c.softcap = softcap;
      c.with_slopes = false;
    });
    add(name + "OfFewQueries", [=](AttentionCase& c) { c.q_len = 2, c.k_len = 300, c.softcap = softcap; });
  }
  add("SlopesOfSequences", [](AttentionCase& c) {
    c.batch = 3;
    c.q_len = c.k_len = 140;
    c.q_heads = 4;
    c.k_heads = 2;
    c.slopes_of_sequences = true;
  });
  add("PackedSequencesWithSlopesOfSequences", [](AttentionCase& c) {
    c.cu_seqlens_q = {0, 100, 101, 230};
    c.cu_seqlens_k = {0, 30, 230, 360};
    c.q_len = 230;
    c.k_len = 360;
    c.window_left = 90;
    c.slopes_of_sequences = true;
  });
  for (const int64_t queries : {1, 2, 3, 4, 5}) {
    add("GroupsOf" + std::to_string(queries) + "Queries", [=](AttentionCase& c) {
      c.batch = 2;
      c.q_len = queries;
      c.k_len = 1000;
      c.q_heads = 3;
      c.head_dim = 21;
      c.seqlens_q = {queries, std::max<int64_t>(1, queries - 1)};
      c.seqlens_k = {1000, 30};
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
    TensorList leaves{in.q, in.k, in.v};
    if (in.slopes.defined()) {
      leaves.push_back(in.slopes);
    }
    TensorList results = gradients({out, lse}, leaves, {at::ones_like(out), at::ones_like(lse)});
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

/// Distances are relative to the nearest key: a query far behind all keys has the result of one at the last key.
TEST_P(AlibiAttentionFarKeys, OfAFarQueryHaveTheProbabilitiesOfTheNearestPosition) {
  for (const int64_t queries : {1, 130}) {
    AttentionCase c;
    c.q_len = queries;
    c.k_len = 140;
    AttentionInputs in = make_attention_inputs(c, GetParam());
    for (const int64_t offset : {int64_t{1} << 20, (int64_t{1} << 30) + 1, -(int64_t{1} << 30) - 1}) {
      in.options.query_offset(offset);
      const at::Tensor far = attend(in);
      for (const int64_t row : {int64_t{0}, queries - 1}) {
        AttentionInputs near = in;
        near.q = in.q.narrow(1, row, 1);
        near.options.query_offset(offset > 0 ? c.k_len - 1 : 0);
        const at::Tensor expected = attend(near).to(at::kDouble);
        EXPECT_TRUE(at::allclose(
            far.narrow(1, row, 1).to(at::kDouble), expected, 4 * unit_roundoff(dtype()),
            200 * unit_roundoff(table_dtype(dtype()))))
            << "row " << row << ", offset " << offset;
      }
    }
  }
}

class AlibiAttentionHiddenByWindows : public TargetTest {
 protected:
  /// Expects that a value of key `kSpoilt` has no part in results of rows that do not see it: out and the gradient of
  /// q.
  void expect_hidden(const AttentionCase& c, int64_t spoilt) const {
    const AttentionInputs in = make_attention_inputs(c, GetParam());
    const auto results = [](const AttentionInputs& of) {
      const AttentionInputs leaves = attention_leaves(of);
      const at::Tensor out = attend(leaves);
      return TensorList{out.detach(), gradients({out}, {leaves.q}, {at::ones_like(out)})[0]};
    };
    const TensorList expected = results(in);
    const int64_t offset = c.k_len - c.q_len;
    // Query i sees the key if -left <= key - i - offset <= right.
    const int64_t first = c.window_right ? std::clamp<int64_t>(spoilt - *c.window_right - offset, 0, c.q_len) : 0;
    const int64_t end = c.window_left ? std::clamp<int64_t>(spoilt + *c.window_left + 1 - offset, 0, c.q_len) : c.q_len;
    for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
      for (const bool in_keys : {false, true}) {
        SCOPED_TRACE(c10::str(c, ", key ", spoilt, ", ", value, in_keys ? " in k" : " in v"));
        AttentionInputs of = in;
        at::Tensor& x = in_keys ? of.k : of.v;
        x = x.clone();
        x.select(1, spoilt).fill_(value);
        const TensorList actual = results(of);
        for (size_t i = 0; i < actual.size(); ++i) {
          expect_same_bits(actual[i].slice(1, 0, first), expected[i].slice(1, 0, first));
          expect_same_bits(actual[i].slice(1, end), expected[i].slice(1, end));
        }
        if (!in_keys && first < end) {
          EXPECT_FALSE(actual[0].slice(1, first, end).isfinite().any().item<bool>());
        }
      }
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttentionHiddenByWindows, ::testing::ValuesIn(targets(at::kCPU)), target_name);

TEST_P(AlibiAttentionHiddenByWindows, ValuesReachNoRow) {
  AttentionCase c;
  c.batch = 1;
  c.q_heads = 2;
  c.head_dim = 16;
  for (const std::optional<double> softcap : {std::optional<double>(), std::optional<double>(5)}) {
    for (const auto& [left, right] : std::vector<std::pair<std::optional<int64_t>, std::optional<int64_t>>>{
             {20, 3}, {150, 0}, {std::nullopt, 70}, {60, std::nullopt}}) {
      c.softcap = softcap;
      c.window_left = left;
      c.window_right = right;
      c.q_len = 210;
      c.k_len = 300;
      for (const int64_t key : {127, 299}) {
        expect_hidden(c, key);
      }
      c.q_len = 3;
      for (const int64_t key : {298, 299}) {
        expect_hidden(c, key);
      }
    }
  }
}

}  // namespace
}  // namespace posenc::test
