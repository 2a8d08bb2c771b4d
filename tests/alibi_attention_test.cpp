#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <posenc/alibi.h>
#include <posenc/alibi_attention.h>
#include <posenc/modules/alibi_bias.h>
#include <posenc/reference.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>

namespace posenc::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

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

}  // namespace
}  // namespace posenc::test
