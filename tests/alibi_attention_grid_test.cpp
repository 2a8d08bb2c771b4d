#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

// Attention over a grid of shapes, strides and flags, against the formula in scalar loops.
namespace posenc::test {
namespace {

/// Cases that each change one aspect of a default call.
std::vector<AttentionCase> grid() {
  std::vector<AttentionCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(AttentionCase&)>& change) {
    AttentionCase c;
    c.name = name;
    change(c);
    cases.push_back(c);
    c.name += "Causal";
    c.causal = true;
    cases.push_back(c);
  };
  add("Default", [](AttentionCase&) {});
  for (const auto& [queries, keys] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {1, 12}, {3, 12}, {12, 3}, {9, 1}, {17, 17}, {64, 64}}) {
    add("S" + std::to_string(queries) + "By" + std::to_string(keys),
        [q = queries, k = keys](AttentionCase& c) { c.q_len = q, c.k_len = k; });
  }
  // S % 128 == 64: half of a tile of the fused kernels.
  add("S192", [](AttentionCase& c) { c.q_len = c.k_len = 192, c.batch = 1, c.q_heads = c.k_heads = 1; });
  for (const auto& [heads, shared] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {4, 4}, {4, 1}, {6, 3}}) {
    add("Heads" + std::to_string(heads) + "Over" + std::to_string(shared),
        [h = heads, g = shared](AttentionCase& c) { c.q_heads = h, c.k_heads = g; });
  }
  for (const int64_t size : {1, 3, 64, 80}) {
    add("HeadSize" + std::to_string(size), [=](AttentionCase& c) { c.head_dim = size; });
  }
  for (const int64_t offset : {-12, -3, 0, 1, 4, 100}) {
    add("Offset" + std::string(offset < 0 ? "Minus" : "") + std::to_string(std::abs(offset)),
        [=](AttentionCase& c) { c.query_offset = offset; });
  }
  for (const double scale : {0.5, -1.0, 0.0}) {
    add("Scale" + std::to_string(cases.size()), [=](AttentionCase& c) { c.scale = scale; });
  }
  for (int strides = 1; strides < kStrides; ++strides) {
    add("Strides" + std::to_string(strides), [=](AttentionCase& c) { c.strides = static_cast<Strides>(strides); });
  }
  add("EveryOtherSlope", [](AttentionCase& c) { c.every_other_slope = true; });
  add("SlopesOfSequences", [](AttentionCase& c) { c.slopes_of_sequences = true; });
  add("SlopesOfSequencesStrided", [](AttentionCase& c) { c.slopes_of_sequences = c.every_other_slope = true; });
  add("SlopesOfSequencesAndSeqlens", [](AttentionCase& c) {
    c.slopes_of_sequences = true;
    c.seqlens_q = {3, 5};
    c.seqlens_k = {7, 2};
  });
  add("SlopesOfSequencesPacked", [](AttentionCase& c) {
    c.slopes_of_sequences = true;
    c.q_len = c.k_len = 12;
    c.cu_seqlens_q = c.cu_seqlens_k = {0, 0, 1, 6, 6, 7, 12};
  });
  for (const auto& [name, change] : std::vector<std::pair<std::string, std::function<void(AttentionCase&)>>>{
           {"", [](AttentionCase&) {}},
           {"WithOffset", [](AttentionCase& c) { c.query_offset = 1; }},
           {"OfOneQuery", [](AttentionCase& c) { c.q_len = 1; }},
           {"AndSeqlens", [](AttentionCase& c) { c.seqlens_q = {3, 5}, c.seqlens_k = {7, 2}; }},
           {"Packed", [](AttentionCase& c) { c.q_len = c.k_len = 12, c.cu_seqlens_q = {0, 3, 3, 12}; }}}) {
    add("WithoutSlopes" + name, [&change = change](AttentionCase& c) {
      c.with_slopes = false;
      change(c);
    });
  }
  const auto add_window = [&add](
                              const std::string& name, std::optional<int64_t> left, std::optional<int64_t> right,
                              const std::function<void(AttentionCase&)>& change) {
    add("Window" + name, [&](AttentionCase& c) {
      c.q_len = c.k_len = 12;
      c.window_left = left;
      c.window_right = right;
      change(c);
    });
  };
  add_window("OfThePosition", 0, 0, [](AttentionCase&) {});
  add_window("Left", 2, std::nullopt, [](AttentionCase&) {});
  add_window("Right", std::nullopt, 1, [](AttentionCase&) {});
  add_window("BeyondAllKeys", 12, std::numeric_limits<int64_t>::max(), [](AttentionCase&) {});
  add_window("OfOneQuery", 2, 0, [](AttentionCase& c) { c.q_len = 1; });
  add_window("BehindAllKeys", 2, 3, [](AttentionCase& c) { c.query_offset = 10; });
  add_window("BeforeAllKeys", 2, 3, [](AttentionCase& c) { c.query_offset = -10; });
  add_window("WithoutSlopes", 2, 1, [](AttentionCase& c) { c.with_slopes = false; });
  add_window("AndSeqlens", 2, 1, [](AttentionCase& c) { c.seqlens_q = {3, 12}, c.seqlens_k = {12, 5}; });
  add_window("Packed", 2, 1, [](AttentionCase& c) { c.cu_seqlens_q = {0, 3, 3, 12}; });
  add_window("PackedOfOtherKeys", 1, 2, [](AttentionCase& c) {
    c.cu_seqlens_q = {0, 3, 3, 12};
    c.cu_seqlens_k = {0, 8, 9, 12};
  });
  add("SeqlensOfBoth", [](AttentionCase& c) { c.seqlens_q = {3, 5}, c.seqlens_k = {7, 2}; });
  add("SeqlensOfSelfAttention", [](AttentionCase& c) { c.k_len = 5, c.seqlens_q = c.seqlens_k = {3, 5}; });
  add("SeqlensOfNone", [](AttentionCase& c) { c.seqlens_q = {0, 5}, c.seqlens_k = {4, 0}; });
  add("SeqlensOfKeys", [](AttentionCase& c) { c.query_offset = 2, c.seqlens_k = {7, 2}; });
  add("SeqlensOfQueries", [](AttentionCase& c) { c.query_offset = 2, c.seqlens_q = {5, 1}; });
  add("Packed", [](AttentionCase& c) { c.q_len = c.k_len = 12, c.cu_seqlens_q = c.cu_seqlens_k = {0, 3, 12}; });
  add("PackedWithLengthOneAndZero", [](AttentionCase& c) {
    c.q_len = c.k_len = 12;
    c.cu_seqlens_q = c.cu_seqlens_k = {0, 0, 1, 6, 6, 7, 12};
  });
  add("PackedWithoutCuSeqlensK", [](AttentionCase& c) { c.q_len = c.k_len = 9, c.cu_seqlens_q = {0, 4, 9}; });
  add("PackedOfOtherKeys", [](AttentionCase& c) {
    c.q_len = 7;
    c.k_len = 11;
    c.cu_seqlens_q = {0, 3, 3, 7};
    c.cu_seqlens_k = {0, 8, 9, 11};
  });
  add("PackedWithTokensOfNoSequence", [](AttentionCase& c) {
    c.q_len = c.k_len = 12;
    c.cu_seqlens_q = c.cu_seqlens_k = {2, 5, 9};
  });
  add("PackedWithOffset", [](AttentionCase& c) {
    c.q_len = c.k_len = 12;
    c.query_offset = 1;
    c.cu_seqlens_q = c.cu_seqlens_k = {0, 3, 12};
  });
  add("PackedAndStrided", [](AttentionCase& c) {
    c.q_len = c.k_len = 12;
    c.strides = Strides::reversed;
    c.cu_seqlens_q = c.cu_seqlens_k = {0, 3, 12};
  });
  return cases;
}

class AlibiAttentionGrid : public ::testing::TestWithParam<std::tuple<Target, AttentionCase>> {
 protected:
  void SetUp() override {
    require_device(target().device);
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    inputs_ = make_attention_inputs(std::get<1>(GetParam()), target());
  }

  const Target& target() const { return std::get<0>(GetParam()); }

  AttentionInputs inputs_;
};

TEST_P(AlibiAttentionGrid, ResultsAreTheFormula) {
  expect_scalar_results(inputs_);
}

TEST_P(AlibiAttentionGrid, ReferenceIsTheFormula) {
  const auto [out, lse] = reference_attention(inputs_);
  const ScalarAttention expected = scalar_attention(inputs_, at::zeros_like(out), at::zeros_like(lse));
  expect_held(out, expected.values.out, expected.bounds.out, "out");
  expect_held(lse, expected.values.lse, expected.bounds.lse, "lse");
}

TEST_P(AlibiAttentionGrid, ResultsAreTheSameBitsEveryTime) {
  const AttentionInputs in = attention_leaves(inputs_);
  const auto all = [&] {
    const auto [out, lse] = attend_with_lse(in);
    TensorList results = gradients({out, lse}, {in.q, in.k, in.v, in.slopes}, {at::ones_like(out), at::ones_like(lse)});
    results.push_back(out);
    results.push_back(lse);
    return results;
  };
  const TensorList first = all();
  const TensorList second = all();
  for (size_t i = 0; i < first.size(); ++i) {
    ASSERT_EQ(first[i].defined(), second[i].defined());
    if (first[i].defined()) {
      expect_same_bits(first[i], second[i]);
    }
  }
}

std::string grid_name(const ::testing::TestParamInfo<std::tuple<Target, AttentionCase>>& info) {
  return std::get<1>(info.param).name + "_" + at::toString(std::get<0>(info.param).dtype);
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiAttentionGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCPU)), ::testing::ValuesIn(grid())),
    grid_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiAttentionGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCUDA)), ::testing::ValuesIn(grid())),
    grid_name);

}  // namespace
}  // namespace posenc::test
