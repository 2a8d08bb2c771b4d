#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <posenc/alibi.h>
#include <posenc/modules/alibi_bias.h>
#include <posenc/reference.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <limits>

namespace posenc::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---------------------------------------------------------------------------------------------------------------------
// A grid of shapes, strides and flags

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

// ---------------------------------------------------------------------------------------------------------------------
// Calls with equal results

class AlibiAttention : public DeviceTest {
 protected:
  AttentionInputs inputs(const AttentionCase& c, at::ScalarType dtype = at::kFloat) const {
    return make_attention_inputs(c, {device().type(), dtype});
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttention, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttention, ::testing::Values(at::kCUDA), device_name);

/// Expects float64 results that differ by the order of sums only: a few hundred roundings of numbers around 1.
void expect_equal(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor wide = expected.detach().to(at::kCPU, at::kDouble);
  expect_held(actual, wide, (wide.abs() + 1) * 1e-13, "float64");
}

TEST_P(AlibiAttention, PackedEqualsItsSequencesOneByOne) {
  for (const bool causal : {false, true}) {
    AttentionCase c;
    c.causal = causal;
    c.q_len = 150;
    c.k_len = 190;
    c.cu_seqlens_q = {0, 1, 70, 70, 134, 150};
    c.cu_seqlens_k = {0, 40, 109, 120, 184, 190};
    const AttentionInputs in = attention_leaves(inputs(c, at::kDouble));
    const auto [out, lse] = attend_with_lse(in);
    const at::Tensor grad = at::randn(out.sizes(), at::kDouble).to(device());
    const TensorList found = gradients({out, lse}, {in.q, in.k, in.v, in.slopes}, {grad, at::ones_like(lse)});
    at::Tensor slopes_gradient = at::zeros_like(found[3]);
    for (size_t n = 0; n + 1 < c.cu_seqlens_q.size(); ++n) {
      const int64_t first_q = c.cu_seqlens_q[n];
      const int64_t first_k = c.cu_seqlens_k[n];
      const int64_t q_len = c.cu_seqlens_q[n + 1] - first_q;
      const int64_t k_len = c.cu_seqlens_k[n + 1] - first_k;
      AttentionInputs one = in;
      one.q = in.q.detach().narrow(0, first_q, q_len).unsqueeze(0).requires_grad_();
      one.k = in.k.detach().narrow(0, first_k, k_len).unsqueeze(0).requires_grad_();
      one.v = in.v.detach().narrow(0, first_k, k_len).unsqueeze(0).requires_grad_();
      one.options = ALiBiAttentionOptions().causal(causal);
      const auto [one_out, one_lse] = attend_with_lse(one);
      expect_equal(out.narrow(0, first_q, q_len), one_out[0]);
      expect_equal(lse.narrow(1, first_q, q_len), one_lse[0]);
      const TensorList of_one = gradients(
          {one_out, one_lse}, {one.q, one.k, one.v, one.slopes},
          {grad.narrow(0, first_q, q_len).unsqueeze(0), at::ones_like(one_lse)});
      expect_equal(found[0].narrow(0, first_q, q_len), of_one[0][0]);
      expect_equal(found[1].narrow(0, first_k, k_len), of_one[1][0]);
      expect_equal(found[2].narrow(0, first_k, k_len), of_one[2][0]);
      slopes_gradient = slopes_gradient + of_one[3];
    }
    // For float64 q, the gradient of float32 slopes is computed in float64 and then rounded to float32.
    const at::Tensor expected = slopes_gradient.to(at::kCPU, at::kDouble);
    expect_within(found[3], expected, (expected.abs() + 1) * 1e-6);
  }
}

TEST_P(AlibiAttention, PackedSequencesMayBeginBehindTokensOfNone) {
  AttentionCase c;
  c.q_len = c.k_len = 9;
  c.cu_seqlens_q = {5, 7, 9};  // five tokens of no sequence, more than the longest sequence has
  AttentionInputs in = inputs(c, at::kDouble);
  in.options.max_seqlen_q(2);
  const at::Tensor out = attend(in);
  EXPECT_TRUE(out.slice(0, 0, 5).eq(0).all().item<bool>());
  for (at::Tensor* x : {&in.q, &in.k, &in.v}) {
    *x = x->slice(0, 5);
  }
  in.options.cu_seqlens_q(at::tensor({0, 2, 4}).to(device()));
  expect_equal(out.slice(0, 5), attend(in));
}

TEST_P(AlibiAttention, PaddedBatchEqualsItsSequencesOneByOne) {
  for (const bool causal : {false, true}) {
    AttentionCase c;
    c.causal = causal;
    c.batch = 3;
    c.q_len = c.k_len = 65;
    c.seqlens_q = {65, 1, 33};
    c.seqlens_k = {65, 20, 33};
    const AttentionInputs in = inputs(c, at::kDouble);
    const at::Tensor out = attend(in);
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t q_len = c.seqlens_q[static_cast<size_t>(b)];
      const int64_t k_len = c.seqlens_k[static_cast<size_t>(b)];
      AttentionInputs one = in;
      one.q = in.q.narrow(0, b, 1).narrow(1, 0, q_len);
      one.k = in.k.narrow(0, b, 1).narrow(1, 0, k_len);
      one.v = in.v.narrow(0, b, 1).narrow(1, 0, k_len);
      one.options = ALiBiAttentionOptions().causal(causal);
      expect_equal(out.narrow(0, b, 1).narrow(1, 0, q_len), attend(one));
      EXPECT_TRUE(out[b].narrow(0, q_len, c.q_len - q_len).eq(0).all().item<bool>());
    }
  }
}

TEST_P(AlibiAttention, WhatLiesBehindTheLengthsHasNoPartInIt) {
  AttentionCase c;
  c.k_len = 5;
  c.seqlens_q = c.seqlens_k = {3, 5};
  const AttentionInputs in = inputs(c);
  AttentionInputs changed = in;
  for (at::Tensor* tensor : {&changed.q, &changed.k, &changed.v}) {
    *tensor = tensor->clone();
    (*tensor)[0].narrow(0, 3, 2).fill_(1e4);
  }
  expect_same_bits(attend(changed), attend(in));
}

TEST_P(AlibiAttention, DecodingWithACacheEqualsTheFullPass) {
  AttentionCase c;
  c.q_len = c.k_len = 20;
  c.causal = true;
  const AttentionInputs in = inputs(c, at::kDouble);
  const at::Tensor full = attend(in);
  // Two tokens at once, then single tokens. `cached` reads a cache of 20 tokens of which seqlens_k are written.
  for (const auto& [begin, count] : std::vector<std::pair<int64_t, int64_t>>{{0, 2}, {2, 1}, {3, 1}, {19, 1}}) {
    AttentionInputs step = in;
    step.q = in.q.narrow(1, begin, count);
    step.k = in.k.narrow(1, 0, begin + count);
    step.v = in.v.narrow(1, 0, begin + count);
    expect_equal(attend(step), full.narrow(1, begin, count));
    AttentionInputs cached = in;
    cached.q = step.q;
    const auto lengths = [&](int64_t length) { return at::full({c.batch}, length, at::kInt).to(device()); };
    cached.options.seqlens_q(lengths(count)).seqlens_k(lengths(begin + count));
    expect_equal(attend(cached), full.narrow(1, begin, count));
  }
}

TEST_P(AlibiAttention, PartsOfTheKeysMergedByLseEqualTheWhole) {
  for (const bool causal : {false, true}) {
    AttentionCase c;
    c.q_len = c.k_len = 24;
    c.causal = causal;
    const AttentionInputs in = inputs(c, at::kDouble);
    const auto [whole, whole_lse] = attend_with_lse(in);
    TensorList outs;
    TensorList lses;
    for (const auto& [begin, count] : std::vector<std::pair<int64_t, int64_t>>{{0, 7}, {7, 12}, {19, 5}}) {
      AttentionInputs part = in;
      part.k = in.k.narrow(1, begin, count);
      part.v = in.v.narrow(1, begin, count);
      part.options.query_offset(-begin);
      const auto [out, lse] = attend_with_lse(part);
      outs.push_back(out);
      lses.push_back(lse);
    }
    const at::Tensor all = at::stack(lses);
    const at::Tensor merged_lse = at::logsumexp(all, 0);
    const at::Tensor weights = (all - merged_lse).exp().transpose(2, 3).unsqueeze(-1);  // [parts, B, S, H, 1]
    expect_equal((weights * at::stack(outs)).sum(0), whole);
    expect_equal(merged_lse, whole_lse);
  }
}

TEST_P(AlibiAttention, EqualsItselfInManyBlocksOfRows) {
  // More scores than one block of rows holds.
  for (const bool causal : {false, true}) {
    AttentionCase c;
    c.batch = c.q_heads = c.k_heads = 1;
    c.q_len = 4097;
    c.k_len = 4100;
    c.causal = causal;
    c.largest_slope = 0.0625;
    const AttentionInputs in = attention_leaves(inputs(c, at::kDouble));
    const at::Tensor out = attend(in);
    const at::Tensor expected = std::get<0>(reference::alibi_attention(in.q, in.k, in.v, in.slopes, in.options));
    expect_equal(out, expected);
    const at::Tensor grad = at::randn(out.sizes(), at::kDouble).to(device());
    const TensorList found = gradients({out}, {in.q, in.k, in.v, in.slopes}, {grad});
    const TensorList wanted = gradients({expected}, {in.q, in.k, in.v, in.slopes}, {grad});
    for (size_t i = 0; i < 3; ++i) {
      expect_equal(found[i], wanted[i]);
    }
    const at::Tensor of_slopes = wanted[3].to(at::kCPU, at::kDouble);
    expect_within(found[3], of_slopes, of_slopes.abs() * 1e-6);
  }
}

TEST_P(AlibiAttention, KeepsTheMemoryLayoutOfQ) {
  for (const Strides strides : {Strides::dense, Strides::head_major, Strides::token_major}) {
    AttentionCase c;
    c.strides = strides;
    const AttentionInputs in = attention_leaves(inputs(c));
    const at::Tensor out = attend(in);
    EXPECT_EQ(out.strides(), in.q.strides());
    const TensorList found = gradients({out}, {in.q, in.k, in.v}, {at::ones_like(out)});
    EXPECT_EQ(found[0].strides(), in.q.strides());
    EXPECT_EQ(found[1].strides(), in.k.strides());
  }
}

TEST_P(AlibiAttention, OfEmptyTensorsIsEmptyOrZero) {
  const auto expect_zeros = [&](const std::function<void(AttentionCase&)>& change) {
    AttentionCase c;
    change(c);
    const AttentionInputs in = attention_leaves(inputs(c));
    const auto [out, lse] = attend_with_lse(in);
    EXPECT_EQ(out.sizes(), in.q.sizes());
    EXPECT_TRUE(out.eq(0).all().item<bool>());
    EXPECT_TRUE(lse.eq(-kInfinity).all().item<bool>());
    const TensorList found =
        gradients({out, lse}, {in.q, in.k, in.v, in.slopes}, {at::ones_like(out), at::ones_like(lse)});
    for (const at::Tensor& gradient : found) {
      EXPECT_TRUE(gradient.eq(0).all().item<bool>());
    }
  };
  expect_zeros([](AttentionCase& c) { c.batch = 0; });
  expect_zeros([](AttentionCase& c) { c.q_len = 0; });
  expect_zeros([](AttentionCase& c) { c.k_len = 0; });
  expect_zeros([](AttentionCase& c) { c.q_heads = c.k_heads = 0; });
  expect_zeros([](AttentionCase& c) { c.q_len = c.k_len = 0, c.cu_seqlens_q = {0}; });
  expect_zeros([](AttentionCase& c) { c.q_len = c.k_len = 3, c.cu_seqlens_q = {0}; });
  expect_zeros([](AttentionCase& c) { c.q_len = c.k_len = 3, c.cu_seqlens_q = {0, 0, 0}; });
  expect_zeros([](AttentionCase& c) { c.q_len = 3, c.k_len = 0, c.cu_seqlens_q = {0, 3}, c.cu_seqlens_k = {0, 0}; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Autocast

class AlibiAttentionAutocast : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    at::autocast::set_autocast_enabled(GetParam(), true);
    at::autocast::set_autocast_dtype(GetParam(), at::kBFloat16);
  }

  void TearDown() override {
    at::autocast::set_autocast_enabled(GetParam(), false);
    at::autocast::clear_cache();
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttentionAutocast, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttentionAutocast, ::testing::Values(at::kCUDA), device_name);

TEST_P(AlibiAttentionAutocast, CastsAllButTheSlopes) {
  const AttentionInputs in = make_attention_inputs(AttentionCase(), {GetParam(), at::kFloat});
  const at::Tensor out = attend(in);
  at::autocast::set_autocast_enabled(GetParam(), false);
  AttentionInputs narrow = in;
  narrow.q = in.q.to(at::kBFloat16);
  narrow.k = in.k.to(at::kBFloat16);
  narrow.v = in.v.to(at::kBFloat16);
  expect_same_bits(out, attend(narrow));
}

TEST_P(AlibiAttentionAutocast, LeavesFloat64AsItIs) {
  const AttentionInputs in = make_attention_inputs(AttentionCase(), {GetParam(), at::kDouble});
  const at::Tensor out = attend(in);
  at::autocast::set_autocast_enabled(GetParam(), false);
  expect_same_bits(out, attend(in));
}

TEST_P(AlibiAttentionAutocast, GradientsHaveTheDtypeOfTheirTensors) {
  const AttentionInputs in = attention_leaves(make_attention_inputs(AttentionCase(), {GetParam(), at::kFloat}));
  const at::Tensor out = attend(in);
  EXPECT_EQ(out.scalar_type(), at::kBFloat16);
  for (const at::Tensor& gradient : gradients({out}, {in.q, in.k, in.v, in.slopes}, {at::ones_like(out)})) {
    EXPECT_EQ(gradient.scalar_type(), at::kFloat);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Dispatcher and Meta

TEST(AlibiAttentionDispatcher, SchemaIsThePublicOne) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("posenc::alibi_attention", "");
  EXPECT_EQ(
      c10::str(op.schema()),
      "posenc::alibi_attention(Tensor q, Tensor k, Tensor v, Tensor? slopes, *, float? scale=None, bool causal=False, "
      "SymInt? query_offset=None, Tensor? seqlens_q=None, Tensor? seqlens_k=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, SymInt? window_left=None, "
      "SymInt? window_right=None, float? softcap=None) -> (Tensor out, Tensor lse)");
}

TEST(AlibiAttentionDispatcher, MetaTensorsHaveTheShapesOfTheResults) {
  for (const bool packed : {false, true}) {
    AttentionCase c;
    if (packed) {
      c.q_len = c.k_len = 12;
      c.cu_seqlens_q = {0, 3, 12};
    }
    const AttentionInputs in = make_attention_inputs(c, {at::kCPU, at::kHalf});
    const auto [out, lse] = attend_with_lse(in);
    AttentionInputs meta = in;
    for (at::Tensor* tensor : {&meta.q, &meta.k, &meta.v, &meta.slopes}) {
      *tensor = tensor->to(at::kMeta).requires_grad_();
    }
    if (packed) {
      meta.options.cu_seqlens_q(in.options.cu_seqlens_q()->to(at::kMeta));
    }
    const auto [meta_out, meta_lse] = attend_with_lse(meta);
    EXPECT_TRUE(meta_out.is_meta());
    EXPECT_EQ(meta_out.sizes(), out.sizes());
    EXPECT_EQ(meta_out.strides(), out.strides());
    EXPECT_EQ(meta_out.scalar_type(), out.scalar_type());
    EXPECT_EQ(meta_lse.sizes(), lse.sizes());
    EXPECT_EQ(meta_lse.strides(), lse.strides());
    EXPECT_EQ(meta_lse.scalar_type(), lse.scalar_type());
    const TensorList found = gradients({meta_out}, {meta.q, meta.k, meta.v, meta.slopes}, {at::ones_like(meta_out)});
    EXPECT_EQ(found[0].sizes(), in.q.sizes());
    EXPECT_EQ(found[1].sizes(), in.k.sizes());
    EXPECT_EQ(found[3].sizes(), in.slopes.sizes());
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Module

TEST_P(AlibiAttention, OfTheModuleTakesItsSlopesAndCausality) {
  for (const bool causal : {false, true}) {
    ALiBiBias module(ALiBiBiasOptions(4).causal(causal));
    AttentionInputs in = inputs(AttentionCase());
    in.slopes = posenc::alibi_slopes(4).to(device());
    in.options.causal(causal);
    const auto [out, lse] = attend_with_lse(in);
    expect_same_bits(module->attention(in.q, in.k, in.v), out);
    expect_same_bits(std::get<1>(module->attention_with_lse(in.q, in.k, in.v)), lse);
    expect_same_bits(
        module->attention(in.q, in.k, in.v, ALiBiAttentionOptions().scale(0.5).query_offset(1)),
        attend({in.q, in.k, in.v, in.slopes, ALiBiAttentionOptions().causal(causal).scale(0.5).query_offset(1)}));
  }
}

TEST_P(AlibiAttention, OfTheModuleTrainsItsSlopes) {
  ALiBiBias module(ALiBiBiasOptions(4).learnable(true));
  module->to(device());
  const AttentionInputs in = inputs(AttentionCase());
  module->attention(in.q, in.k, in.v).square().sum().backward();
  ASSERT_TRUE(module->slopes.grad().defined());
  EXPECT_TRUE(module->slopes.grad().ne(0).all().item<bool>());
}

TEST_P(AlibiAttention, OfTheModuleRefusesToBeCausalWhereTheModuleIsNot) {
  ALiBiBias module(ALiBiBiasOptions(4));
  const AttentionInputs in = inputs(AttentionCase());
  expect_error(
      [&] { module->attention(in.q, in.k, in.v, ALiBiAttentionOptions().causal(true)); },
      {"posenc::ALiBiBias: ", "causal"});
  expect_error([&] { module->attention(at::Tensor(), in.k, in.v); }, {"posenc::ALiBiBias: ", "expected q"});
  expect_error(
      [&] { module->attention(in.q, in.k, in.v, ALiBiAttentionOptions().slopes(in.slopes)); },
      {"expected options without slopes", "got slopes in both"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors

struct BadCall {
  std::string name;
  std::vector<std::string> parts;
  std::function<void(AttentionInputs&)> spoil;
  bool packed = false;
};

std::ostream& operator<<(std::ostream& stream, const BadCall& call) {
  return stream << call.name;
}

/// Invalid calls: q `[2, 5, 4, 8]` and k `[2, 7, 2, 8]`, or packed q `[12, 4, 8]`, with one argument changed.
std::vector<BadCall> bad_calls() {
  std::vector<BadCall> calls;
  const auto add = [&calls](
                       const std::string& name, const std::vector<std::string>& parts,
                       const std::function<void(AttentionInputs&)>& spoil) {
    calls.push_back({name, parts, spoil, /*packed=*/false});
  };
  const auto add_packed = [&calls](
                              const std::string& name, const std::vector<std::string>& parts,
                              const std::function<void(AttentionInputs&)>& spoil) {
    calls.push_back({name, parts, spoil, /*packed=*/true});
  };
  const auto lengths = [](const AttentionInputs& in, const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).to(in.q.device());
  };
  add("QOfTwoDimensions", {"expected q", "[B, Sq, Hq, D]", "got [4, 8]"},
      [](AttentionInputs& in) { in.q = in.q[0][0]; });
  add("QOfIntegers", {"expected q", "float16", "got Int"}, [](AttentionInputs& in) { in.q = in.q.to(at::kInt); });
  add("UndefinedQ", {"q", "undefined"}, [](AttentionInputs& in) { in.q = at::Tensor(); });
  add("UndefinedK", {"k", "undefined"}, [](AttentionInputs& in) { in.k = at::Tensor(); });
  add("UndefinedV", {"v", "undefined"}, [](AttentionInputs& in) { in.v = at::Tensor(); });
  add("SlopesInTheOptionsToo", {"options without slopes", "got slopes in both"},
      [](AttentionInputs& in) { in.options.slopes(in.slopes); });
  add("KOfThreeDimensions", {"expected k", "[B, Sk, Hk, D]", "got [7, 2, 8]"},
      [](AttentionInputs& in) { in.k = in.k[0]; });
  add("KOfAnotherDtype", {"expected k", "dtype", "Float", "got Double"},
      [](AttentionInputs& in) { in.k = in.k.to(at::kDouble); });
  add("KOnAnotherDevice", {"expected k", "device", "got Float on meta"},
      [](AttentionInputs& in) { in.k = in.k.to(at::kMeta); });
  add("KOfAnotherBatch", {"expected k", "batch size of q, 2", "got [1, 7, 2, 8]"}, [](AttentionInputs& in) {
    in.k = in.k.narrow(0, 0, 1);
    in.v = in.v.narrow(0, 0, 1);
  });
  add("KOfAnotherHeadSize", {"same positive head size", "got 8 and 4"}, [](AttentionInputs& in) {
    in.k = in.k.narrow(3, 0, 4);
    in.v = in.v.narrow(3, 0, 4);
  });
  add("HeadsOfSizeZero", {"same positive head size", "got 0 and 0"}, [](AttentionInputs& in) {
    in.q = in.q.narrow(3, 0, 0);
    in.k = in.k.narrow(3, 0, 0);
    in.v = in.v.narrow(3, 0, 0);
  });
  add("HeadsThatDoNotDivide", {"multiple", "got 3 and 2"}, [](AttentionInputs& in) { in.q = in.q.narrow(2, 0, 3); });
  add("VOfAnotherShape", {"expected v", "[2, 7, 2, 8]", "got [2, 6, 2, 8]"},
      [](AttentionInputs& in) { in.v = in.v.narrow(1, 0, 6); });
  add("SlopesOfKeyHeads", {"expected slopes", "[Hq] = [4] or [B, Hq] = [2, 4]", "got [2]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.narrow(0, 0, 2); });
  add("SlopesOfOtherSequences", {"expected slopes", "[Hq] = [4] or [B, Hq] = [2, 4]", "got [3, 4]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.expand({3, 4}); });
  add("SlopesOfThreeDimensions", {"expected slopes", "got [1, 2, 4]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.expand({1, 2, 4}); });
  add_packed(
      "SlopesOfOtherPackedSequences", {"expected slopes", "[N, Hq] = [2, 4]", "got [1, 4]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.unsqueeze(0); });
  add("SlopesOfHalf", {"expected slopes", "float32", "got Half"},
      [](AttentionInputs& in) { in.slopes = in.slopes.to(at::kHalf); });
  add("SlopesOnAnotherDevice", {"expected slopes", "device of q", "got meta"},
      [](AttentionInputs& in) { in.slopes = in.slopes.to(at::kMeta); });
  for (const int64_t offset : {int64_t{1} << 31, -(int64_t{1} << 31), std::numeric_limits<int64_t>::min()}) {
    add("OffsetNumber" + std::to_string(calls.size()), {"query_offset", "2^31", "got " + std::to_string(offset)},
        [offset](AttentionInputs& in) { in.options.query_offset(offset); });
  }
  add("NegativeLeftWindow", {"expected window_left", "not negative", "got -1"},
      [](AttentionInputs& in) { in.options.window_left(-1); });
  add("NegativeRightWindow", {"expected window_right", "not negative", "got -2"},
      [](AttentionInputs& in) { in.options.window(0, -2); });
  for (const double softcap : {0.0, -1.0, kInfinity, std::nan("")}) {
    add("SoftcapNumber" + std::to_string(calls.size()), {"expected softcap", "positive finite", "got "},
        [softcap](AttentionInputs& in) { in.options.softcap(softcap); });
  }
  add("SeqlensOfKeysAlone", {"both seqlens_q and seqlens_k", "query_offset", "got seqlens_k alone"},
      [=](AttentionInputs& in) { in.options.seqlens_k(lengths(in, {1, 2})); });
  add("SeqlensOfQueriesAlone", {"both seqlens_q and seqlens_k", "query_offset", "got seqlens_q alone"},
      [=](AttentionInputs& in) { in.options.seqlens_q(lengths(in, {1, 2})); });
  add("SeqlensOfAnotherBatch", {"expected seqlens_k", "[B] = [2]", "got [3]"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_k(lengths(in, {1, 2, 3})); });
  add("SeqlensOfFloats", {"expected seqlens_k", "int32 or int64", "got Float"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_k(lengths(in, {1, 2}).to(at::kFloat)); });
  add("SeqlensOnAnotherDevice", {"expected seqlens_q", "device of q", "got meta"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_q(lengths(in, {1, 2}).to(at::kMeta)); });
  add("UndefinedSeqlens", {"seqlens_q", "undefined"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_q(at::Tensor()); });
  add("CuSeqlensOfAPaddedBatch", {"cu_seqlens", "packed", "got them with [2, 5, 4, 8]"},
      [=](AttentionInputs& in) { in.options.cu_seqlens_q(lengths(in, {0, 5})); });
  add("MaxSeqlenOfAPaddedBatch", {"max_seqlen", "packed"}, [](AttentionInputs& in) { in.options.max_seqlen_k(7); });
  add_packed("PackedWithoutCuSeqlens", {"expected cu_seqlens_q", "got none"}, [](AttentionInputs& in) {
    in.options.cu_seqlens_q(std::nullopt);
  });
  add_packed("PackedWithSeqlens", {"seqlens_q and seqlens_k", "packed"}, [=](AttentionInputs& in) {
    in.options.seqlens_k(lengths(in, {3, 9}));
  });
  add_packed("EmptyCuSeqlens", {"expected cu_seqlens_q", "[N + 1]", "got [0]"}, [=](AttentionInputs& in) {
    in.options.cu_seqlens_q(lengths(in, {}));
  });
  add_packed("CuSeqlensOfOtherNumbers", {"expected cu_seqlens_k", "[3]", "got [2]"}, [=](AttentionInputs& in) {
    in.options.cu_seqlens_k(lengths(in, {0, 12}));
  });
  add_packed("CuSeqlensOfFloats", {"expected cu_seqlens_q", "int32 or int64", "got Float"}, [=](AttentionInputs& in) {
    in.options.cu_seqlens_q(lengths(in, {0, 3, 12}).to(at::kFloat));
  });
  add_packed("NegativeMaxSeqlen", {"expected max_seqlen_q", "got -1"}, [](AttentionInputs& in) {
    in.options.max_seqlen_q(-1);
  });
  add_packed("OtherTokensWithoutCuSeqlensK", {"expected cu_seqlens_k", "12", "got 11"}, [](AttentionInputs& in) {
    in.options.cu_seqlens_k(std::nullopt);
    in.k = in.k.narrow(0, 0, 11);
    in.v = in.v.narrow(0, 0, 11);
  });
  return calls;
}

AttentionInputs valid_inputs(bool packed, at::DeviceType device) {
  AttentionCase c;
  if (packed) {
    c.q_len = c.k_len = 12;
    c.cu_seqlens_q = c.cu_seqlens_k = {0, 3, 12};
  }
  return make_attention_inputs(c, {device, at::kFloat});
}

class AlibiAttentionErrors : public ::testing::TestWithParam<std::tuple<at::DeviceType, BadCall>> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam())); }
};

TEST_P(AlibiAttentionErrors, NameWhatIsWrong) {
  const auto& [device, call] = GetParam();
  AttentionInputs in = valid_inputs(call.packed, device);
  call.spoil(in);
  std::vector<std::string> parts = call.parts;
  parts.emplace_back("posenc::alibi_attention: ");
  expect_error([&, &in = in] { attend(in); }, parts);
  // The device must still be usable.
  EXPECT_NO_THROW(attend(valid_inputs(call.packed, device)).sum().item<double>());
}

std::string error_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, BadCall>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiAttentionErrors,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(bad_calls())),
    error_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiAttentionErrors,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(bad_calls())),
    error_name);

// Values of seqlens and cu_seqlens are checked only on the CPU.
TEST(AlibiAttentionLengths, OnTheCpuAreRead) {
  AttentionInputs in = valid_inputs(/*packed=*/false, at::kCPU);
  for (const auto& bad : std::vector<std::vector<int64_t>>{{-1, 2}, {2, 8}}) {
    in.options.query_offset(0).seqlens_k(at::tensor(bad, at::kLong));
    expect_error([&] { attend(in); }, {"expected seqlens_k from 0 to 7", "got "});
  }
  AttentionInputs packed = valid_inputs(/*packed=*/true, at::kCPU);
  for (const auto& bad : std::vector<std::vector<int64_t>>{{0, 3, 13}, {0, 9, 3}, {-1, 3, 12}}) {
    packed.options.cu_seqlens_q(at::tensor(bad, at::kLong));
    expect_error([&] { attend(packed); }, {"expected cu_seqlens_q that rise from 0 to at most 12", "got "});
  }
  packed = valid_inputs(/*packed=*/true, at::kCPU);
  packed.options.max_seqlen_k(8);
  expect_error([&] { attend(packed); }, {"expected max_seqlen_k of at least 9", "got 8"});
  packed.options.max_seqlen_k(9);
  const at::Tensor out = attend(packed);
  packed.options.max_seqlen_k(std::nullopt).max_seqlen_q(std::nullopt);
  expect_same_bits(attend(packed), out);
}

class AlibiAttentionDeviceLengths : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttentionDeviceLengths, ::testing::Values(at::kCUDA), device_name);

TEST_P(AlibiAttentionDeviceLengths, OfPackedSequencesNeedTheirLongest) {
  AttentionInputs in = valid_inputs(/*packed=*/true, GetParam());
  in.options.max_seqlen_q(std::nullopt);
  expect_error([&] { attend(in); }, {"expected max_seqlen_q", "GPU"});
}

TEST_P(AlibiAttentionDeviceLengths, BeyondTheTensorsGiveNaNForTheirSequence) {
  AttentionInputs in = valid_inputs(/*packed=*/false, GetParam());
  const auto lengths = [&](const std::vector<int64_t>& values) { return at::tensor(values, at::kInt).to(device()); };
  in.options.seqlens_q(lengths({5, 5})).seqlens_k(lengths({8, 7}));
  const at::Tensor out = attend(in);
  EXPECT_TRUE(out[0].isnan().all().item<bool>());
  EXPECT_FALSE(out[1].isnan().any().item<bool>());
  AttentionInputs packed = valid_inputs(/*packed=*/true, GetParam());
  packed.options.max_seqlen_q(8).max_seqlen_k(8);  // the second sequence has 9 tokens
  const at::Tensor of_packed = attend(packed);
  EXPECT_FALSE(of_packed.narrow(0, 0, 3).isnan().any().item<bool>());
  EXPECT_TRUE(of_packed.narrow(0, 3, 9).isnan().all().item<bool>());
}

}  // namespace
}  // namespace posenc::test
