#include "support.h"

#include <posenc/frequencies.h>
#include <posenc/logging.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/InferenceMode.h>
#include <torch/nn/modules/container/any.h>
#include <torch/serialize.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <thread>

namespace posenc::test {
namespace {

using posenc::Layout;
using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

constexpr int64_t kHeadDim = 16;

/// cos and sin of a module with these options, by the scalar functions of the standard library.
RotaryInputs with_scalar_tables(const RotaryEmbeddingOptions& options, int64_t length, at::ScalarType dtype) {
  const int64_t rotary_dim = options.rotary_dim().value_or(options.head_dim());
  RotaryInputs in;
  in.cos = at::empty({length, rotary_dim / 2}, at::kDouble);
  in.sin = at::empty_like(in.cos);
  auto cos = in.cos.accessor<double, 2>();
  auto sin = in.sin.accessor<double, 2>();
  for (int64_t p = 0; p < length; ++p) {
    for (int64_t i = 0; i < rotary_dim / 2; ++i) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim);
      const double angle = static_cast<double>(p) * std::pow(options.base(), exponent);
      cos[p][i] = std::cos(angle);
      sin[p][i] = std::sin(angle);
    }
  }
  in.cos = in.cos.to(table_dtype(dtype));
  in.sin = in.sin.to(table_dtype(dtype));
  in.interleaved = options.interleaved();
  return in;
}

/// Expects `actual` to be `x` rotated by `positions`, within the rounding of the operator and of cos and sin. Their
/// entries may be rounded differently from the standard library, and have the rounding error of angles up to `length`.
void expect_rotated(
    const at::Tensor& actual,
    const at::Tensor& x,
    const RotaryEmbeddingOptions& options,
    const std::optional<at::Tensor>& positions,
    int64_t length) {
  RotaryInputs in = with_scalar_tables(options, length, x.scalar_type());
  if (positions) {
    in.positions = positions->cpu();
  }
  const at::Tensor on_cpu = x.detach().cpu();
  const double of_entry =
      2 * unit_roundoff(table_dtype(x.scalar_type())) + 8 * unit_roundoff(at::kDouble) * static_cast<double>(length);
  const at::Tensor largest = on_cpu.to(at::kDouble).abs().amax(-1, /*keepdim=*/true);
  const at::Tensor bound = rounding_bound(in, on_cpu) + largest * 2 * of_entry;
  expect_within(actual, scalar_rotation(in, on_cpu), bound);
}

// ---------------------------------------------------------------------------------------------------------------------
// Options

class RotaryEmbeddingOptionsTest : public ::testing::Test {
 protected:
  static void expect_rejected(const RotaryEmbeddingOptions& options, const std::vector<std::string>& parts) {
    expect_error([&] { RotaryEmbedding module(options); }, parts);
  }
};

TEST_F(RotaryEmbeddingOptionsTest, HaveTheDefaultsOfThePaper) {
  const RotaryEmbeddingOptions options(128);
  EXPECT_EQ(options.head_dim(), 128);
  EXPECT_FALSE(options.rotary_dim().has_value());
  EXPECT_EQ(options.base(), 10000.0);
  EXPECT_EQ(options.max_position_embeddings(), 2048);
  EXPECT_FALSE(options.interleaved());
  EXPECT_EQ(options.layout(), Layout::bshd);
  EXPECT_FALSE(options.learnable_frequencies());
}

TEST_F(RotaryEmbeddingOptionsTest, WithBadHeadDimAreRejected) {
  expect_rejected(RotaryEmbeddingOptions(0), {"head_dim", "0"});
  expect_rejected(RotaryEmbeddingOptions(-8), {"head_dim", "-8"});
}

TEST_F(RotaryEmbeddingOptionsTest, WithOddHeadDimNeedARotaryDim) {
  expect_rejected(RotaryEmbeddingOptions(7), {"rotary_dim", "7"});
  EXPECT_NO_THROW(RotaryEmbedding(RotaryEmbeddingOptions(7).rotary_dim(6)));
}

TEST_F(RotaryEmbeddingOptionsTest, WithBadRotaryDimAreRejected) {
  for (const int64_t rotary_dim : {0, -2, 5, 18}) {
    expect_rejected(RotaryEmbeddingOptions(16).rotary_dim(rotary_dim), {"rotary_dim", std::to_string(rotary_dim)});
  }
}

TEST_F(RotaryEmbeddingOptionsTest, WithBadBaseAreRejected) {
  expect_rejected(RotaryEmbeddingOptions(16).base(0), {"base", "0"});
  expect_rejected(RotaryEmbeddingOptions(16).base(-1), {"base", "-1"});
}

TEST_F(RotaryEmbeddingOptionsTest, WithNegativeLengthAreRejected) {
  expect_rejected(RotaryEmbeddingOptions(16).max_position_embeddings(-1), {"max_position_embeddings", "-1"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Every dtype

class RotaryEmbeddingModule : public TargetTest {
 protected:
  at::Tensor random(at::IntArrayRef sizes) const { return random_tensor(sizes, GetParam()); }
  at::Tensor queries(int64_t tokens = 5) const { return random({2, tokens, 4, kHeadDim}); }
  at::Tensor keys(int64_t tokens = 5) const { return random({2, tokens, 2, kHeadDim}); }
  at::Tensor positions(const std::vector<int64_t>& values) const { return at::tensor(values, at::kLong).to(device()); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingModule, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingModule, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(RotaryEmbeddingModule, ForwardIsTheOperatorOnItsTables) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).rotary_dim(12).base(500).interleaved(true));
  const at::Tensor q = queries();
  const at::Tensor k = keys();
  const auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(12, 500), 5, table_dtype(dtype()));
  const auto [expected_q, expected_k] =
      posenc::rotary_embedding_qk(q, k, cos.to(device()), sin.to(device()), std::nullopt, /*interleaved=*/true);
  const auto [actual_q, actual_k] = rope->forward(q, k);
  expect_same_bits(actual_q, expected_q);
  expect_same_bits(actual_k, expected_k);
}

TEST_P(RotaryEmbeddingModule, RotatesByAnglesOfFloat64) {
  for (const bool interleaved : {false, true}) {
    const auto options = RotaryEmbeddingOptions(kHeadDim).interleaved(interleaved).rotary_dim(10);
    RotaryEmbedding rope(options);
    const at::Tensor q = queries();
    const at::Tensor k = keys();
    const auto [actual_q, actual_k] = rope->forward(q, k);
    expect_rotated(actual_q, q, options, std::nullopt, 5);
    expect_rotated(actual_k, k, options, std::nullopt, 5);
  }
}

TEST_P(RotaryEmbeddingModule, PositionsChooseTheAngles) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor q = queries();
  for (const at::Tensor& p : {positions({7, 3, 0, 100, 7}), positions({7, 3, 0, 100, 7, 1, 2, 3, 4, 5}).view({2, 5})}) {
    const auto [actual_q, actual_k] = rope->forward(q, q, p);
    expect_rotated(actual_q, q, RotaryEmbeddingOptions(kHeadDim), p, 101);
    expect_same_bits(actual_k, actual_q);
  }
}

TEST_P(RotaryEmbeddingModule, OneTensorIsRotatedAsInThePair) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor q = queries();
  const at::Tensor k = keys();
  for (const std::optional<at::Tensor>& p : {std::optional<at::Tensor>(), std::optional(positions({4, 3, 2, 1, 0}))}) {
    const auto [q_rotated, k_rotated] = rope->forward(q, k, p);
    expect_same_bits(rope->rotate(q, p), q_rotated);
    expect_same_bits(rope->rotate(k, p), k_rotated);
  }
}

TEST_P(RotaryEmbeddingModule, AllLayoutsGiveTheSameNumbers) {
  const at::Tensor q = queries();
  const at::Tensor k = keys();
  for (const std::optional<at::Tensor>& p :
       {std::optional<at::Tensor>(), std::optional(positions({7, 3, 0, 100, 7})),
        std::optional(positions({7, 3, 0, 100, 7, 1, 2, 3, 4, 5}).view({2, 5}))}) {
    RotaryEmbedding bshd(RotaryEmbeddingOptions{kHeadDim});
    const auto [expected_q, expected_k] = bshd->forward(q, k, p);
    RotaryEmbedding sbhd(RotaryEmbeddingOptions(kHeadDim).layout(Layout::sbhd));
    const auto [q_sbhd, k_sbhd] = sbhd->forward(q.transpose(0, 1).contiguous(), k.transpose(0, 1).contiguous(), p);
    expect_same_bits(q_sbhd.transpose(0, 1), expected_q);
    expect_same_bits(k_sbhd.transpose(0, 1), expected_k);
    EXPECT_TRUE(q_sbhd.is_contiguous());

    RotaryEmbedding bhsd(RotaryEmbeddingOptions(kHeadDim).layout(Layout::bhsd));
    const auto [q_bhsd, k_bhsd] = bhsd->forward(q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), p);
    expect_same_bits(q_bhsd.transpose(1, 2), expected_q);
    expect_same_bits(k_bhsd.transpose(1, 2), expected_k);
    EXPECT_TRUE(q_bhsd.is_contiguous());
    expect_same_bits(bhsd->rotate(q.transpose(1, 2)).transpose(1, 2), bshd->rotate(q));
  }
}

TEST_P(RotaryEmbeddingModule, PackedTokensGiveTheSameNumbers) {
  const at::Tensor q = queries();
  const at::Tensor k = keys();
  RotaryEmbedding bshd(RotaryEmbeddingOptions{kHeadDim});
  const auto [expected_q, expected_k] = bshd->forward(q, k);
  RotaryEmbedding thd(RotaryEmbeddingOptions(kHeadDim).layout(Layout::thd));
  const auto [q_thd, k_thd] = thd->forward(q.flatten(0, 1), k.flatten(0, 1), positions({0, 1, 2, 3, 4, 0, 1, 2, 3, 4}));
  expect_same_bits(q_thd, expected_q.flatten(0, 1));
  expect_same_bits(k_thd, expected_k.flatten(0, 1));
}

TEST_P(RotaryEmbeddingModule, ConvertedToBFloat16RotatesLongContextsRight) {
  // Converting tables or positions with the model, as all peer libraries once did, is wrong from position 257 on.
  const auto options = RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(5000);
  RotaryEmbedding rope(options);
  rope->to(at::kBFloat16);
  rope->to(device());
  const at::Tensor q = queries();
  const at::Tensor p = positions({257, 1001, 2047, 4097, 4999});
  expect_rotated(rope->rotate(q, p), q, options, p, 5000);
}

TEST_P(RotaryEmbeddingModule, ConversionDoesNotTouchTheTables) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor q = queries();
  const at::Tensor expected = rope->rotate(q);
  const int64_t length = rope->table_length(device(), table_dtype(dtype()));
  EXPECT_GT(length, 0);
  for (const at::ScalarType converted : {at::kBFloat16, at::kHalf, at::kDouble}) {
    rope->to(converted);
    rope->to(device(), converted);
    EXPECT_EQ(rope->table_length(device(), table_dtype(dtype())), length);
    expect_same_bits(rope->rotate(q), expected);
  }
}

TEST_P(RotaryEmbeddingModule, GradientIsTheRotationBackwards) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor q = queries().requires_grad_();
  const at::Tensor k = keys().requires_grad_();
  const auto [q_rotated, k_rotated] = rope->forward(q, k);
  (q_rotated.sum() + k_rotated.sum()).backward();
  const auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(kHeadDim), 5, table_dtype(dtype()));
  const auto [expected_q, expected_k] = posenc::rotary_embedding_qk(
      at::ones_like(q), at::ones_like(k), cos.to(device()), sin.to(device()), std::nullopt, false, /*conjugate=*/true);
  expect_same_bits(q.grad(), expected_q);
  expect_same_bits(k.grad(), expected_k);
}

TEST_P(RotaryEmbeddingModule, EmptySequencesWork) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const auto [q, k] = rope->forward(queries(0), keys(0));
  EXPECT_EQ(q.sizes(), at::IntArrayRef({2, 0, 4, kHeadDim}));
  EXPECT_EQ(k.sizes(), at::IntArrayRef({2, 0, 2, kHeadDim}));
  EXPECT_EQ(rope->rotate(queries(0), positions({})).sizes(), q.sizes());
}

TEST_P(RotaryEmbeddingModule, SectionsReadTheirAxes) {
  for (const bool interleaved : {false, true}) {
    RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).sections({4, 2, 2}).interleaved_sections(interleaved));
    const at::Tensor p = at::randint(100, {3, 2, 5}, at::kLong).to(device());
    const auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(kHeadDim), 128, table_dtype(dtype()));
    RotaryInputs in{queries(), keys(), cos.to(device()), sin.to(device()), p};
    in.pair_axes =
        interleaved ? std::vector<int64_t>{0, 1, 2, 0, 1, 2, 0, 0} : std::vector<int64_t>{0, 0, 0, 0, 1, 1, 2, 2};
    const auto [expected_q, expected_k] = rotate_qk(in);
    const auto [q, k] = rope->forward(in.q, in.k, p);
    expect_same_bits(q, expected_q);
    expect_same_bits(k, expected_k);
    expect_same_bits(rope->rotate(in.q, p), expected_q);
    at::Tensor changed_q = in.q.clone();
    at::Tensor changed_k = in.k.clone();
    rope->forward_(changed_q, changed_k, p);
    expect_same_bits(changed_q, expected_q);
    expect_same_bits(changed_k, expected_k);
    changed_q = in.q.clone();
    rope->rotate_(changed_q, p);
    expect_same_bits(changed_q, expected_q);
    const auto [split_q, split_k, split_v] = rope->forward_qkv(at::cat({in.q, in.k, in.k}, 2).flatten(-2), 4, 2, p);
    expect_same_bits(split_q, expected_q);
    expect_same_bits(split_k, expected_k);
    expect_same_bits(split_v, in.k);
  }
}

TEST_P(RotaryEmbeddingModule, SectionsOfPlainTextAreOneAxis) {
  RotaryEmbedding plain(RotaryEmbeddingOptions{kHeadDim});
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).sections({4, 2, 2}));
  const at::Tensor q = queries();
  const at::Tensor p = positions({3, 1, 4, 1, 5});
  expect_same_bits(rope->rotate(q), plain->rotate(q));
  expect_same_bits(rope->rotate(q, p), plain->rotate(q, p));
  expect_same_bits(rope->rotate(q, p.expand({2, 5})), plain->rotate(q, p));
  expect_same_bits(rope->rotate(q, p.expand({3, 2, 5})), plain->rotate(q, p));
  RotaryEmbedding thd(RotaryEmbeddingOptions(kHeadDim).layout(Layout::thd).sections({4, 2, 2}));
  expect_same_bits(thd->rotate(q[0], p.expand({3, 5})), plain->rotate(q, p)[0]);
}

TEST_P(RotaryEmbeddingModule, InPlaceEqualsForwardInEveryLayout) {
  for (const Layout layout : {Layout::bshd, Layout::sbhd, Layout::bhsd}) {
    RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).layout(layout));
    at::Tensor q = queries();
    at::Tensor k = q.clone();
    const at::Tensor before = q.clone();
    rope->forward_(q, k);
    expect_same_bits(q, rope->rotate(before));
    expect_same_bits(k, rope->rotate(before));
    q.copy_(before);
    rope->rotate_(q);
    expect_same_bits(q, k);
  }
}

TEST_P(RotaryEmbeddingModule, PackedProjectionsEqualForward) {
  const at::Tensor q = queries();
  const at::Tensor k = keys();
  const at::Tensor v = keys();
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor p = positions({3, 1, 4, 1, 5});
  const auto [expected_q, expected_k] = rope->forward(q, k, p);
  const at::Tensor qkv = at::cat({q, k, v}, 2).flatten(-2);
  const auto [q_out, k_out, v_out] = rope->forward_qkv(qkv, 4, 2, p);
  expect_same_bits(q_out, expected_q);
  expect_same_bits(k_out, expected_k);
  expect_same_bits(v_out, v);

  RotaryEmbedding sbhd(RotaryEmbeddingOptions(kHeadDim).layout(Layout::sbhd));
  const auto [q_sbhd, k_sbhd, v_sbhd] = sbhd->forward_qkv(qkv.transpose(0, 1).contiguous(), 4, 2, p);
  expect_same_bits(q_sbhd.transpose(0, 1), expected_q);
  expect_same_bits(v_sbhd.transpose(0, 1), v);
  RotaryEmbedding bhsd(RotaryEmbeddingOptions(kHeadDim).layout(Layout::bhsd));
  expect_same_bits(std::get<1>(bhsd->forward_qkv(qkv, 4, 2, p)).transpose(1, 2), expected_k);
  RotaryEmbedding thd(RotaryEmbeddingOptions(kHeadDim).layout(Layout::thd));
  expect_same_bits(std::get<0>(thd->forward_qkv(qkv[1], 4, 2, p)), expected_q[1]);
  const auto [stacked_q, stacked_k, stacked_v] = rope->forward_qkv(at::stack({q, q, q}, 2), 4, 4, p);
  expect_same_bits(stacked_q, expected_q);
  expect_same_bits(stacked_v, q);
}

TEST(RotaryEmbeddingSections, ThatDoNotFitAreErrors) {
  expect_error(
      [] { RotaryEmbedding(RotaryEmbeddingOptions(kHeadDim).sections({4, 2, 3})); },
      {"sections that add up to rotary_dim / 2 = 8", "got [4, 2, 3]"});
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).sections({4, 2, 2}));
  expect_error(
      [&] { rope->rotate(at::zeros({2, 5, 4, kHeadDim}), at::zeros({4, 2, 5}, at::kLong)); },
      {"axis for each of the 3 sections", "got [4, 2, 5]"});
  RotaryEmbedding plain(RotaryEmbeddingOptions{kHeadDim});
  expect_error(
      [&] { plain->rotate(at::zeros({2, 5, 4, kHeadDim}), at::zeros({3, 2, 5}, at::kLong)); },
      {"without pair_axes", "got [3, 2, 5]"});
}

TEST(RotaryEmbeddingPositions, OnACpuEndBeforeTheLastInt32) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const at::Tensor x = at::zeros({1, 2, 1, kHeadDim});
  const at::Tensor positions = at::tensor({int64_t{0}, int64_t{std::numeric_limits<int32_t>::max()}}, at::kLong);
  expect_error([&] { rope->rotate(x, positions); }, {"positions below 2^31 - 1", "2147483647 at index [1]"});
}

TEST(RotaryEmbeddingPairs, ReadTheirAxesAndFrequencies) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(8).pair_axes({0, 0, 1, 1}).pair_frequencies({0, 2, 0, 2}));
  const at::Tensor x = at::randn({1, 3, 2, 8}, at::kDouble);
  const at::Tensor positions = at::tensor({3, 1, 4, 1, 5, 9}, at::kLong).view({2, 3});
  const at::Tensor of_pairs = positions.index_select(0, at::tensor({0, 0, 1, 1})).t().to(at::kDouble);  // [3, 4]
  const at::Tensor angles = of_pairs * at::tensor({1.0, 0.01, 1.0, 0.01}, at::kDouble);  // 10000^(-2i/8) for i = 0, 2
  const at::Tensor cos = angles.cos().unsqueeze(1);
  const at::Tensor sin = angles.sin().unsqueeze(1);
  const auto halves = x.chunk(2, -1);
  const at::Tensor expected = at::cat({halves[0] * cos - halves[1] * sin, halves[0] * sin + halves[1] * cos}, -1);
  EXPECT_TRUE(at::allclose(rope->rotate(x, positions.unsqueeze(1)), expected, 1e-12, 1e-12));
}

TEST(RotaryEmbeddingPairs, TakeOtherTablesAfterReset) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(8).pair_frequencies({0, 2, 0, 2}));
  const at::Tensor x = at::randn({1, 3, 2, 8});
  rope->rotate(x);
  rope->options.pair_frequencies({0, 1, 2, 3});
  rope->reset();
  expect_same_bits(rope->rotate(x), RotaryEmbedding(RotaryEmbeddingOptions(8))->rotate(x));
}

TEST(RotaryEmbeddingPairs, AreLearntFromTheirFrequencies) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(8).pair_frequencies({0, 2, 0, 2}).learnable_frequencies(true));
  EXPECT_TRUE(at::allclose(rope->inv_freq.detach(), at::tensor({1.0f, 0.01f, 1.0f, 0.01f})));
}

TEST(RotaryEmbeddingPairs, ThatDoNotFitAreErrors) {
  const auto make = [](RotaryEmbeddingOptions options) { RotaryEmbedding{std::move(options)}; };
  expect_error(
      [&] { make(RotaryEmbeddingOptions(8).pair_axes({0, 1, 0})); }, {"pair_axes", "4 values of 0 to 3", "[0, 1, 0]"});
  expect_error([&] { make(RotaryEmbeddingOptions(8).pair_axes({0, 1, 0, 4})); }, {"pair_axes", "[0, 1, 0, 4]"});
  expect_error(
      [&] { make(RotaryEmbeddingOptions(8).pair_frequencies({0, 1, -1, 2})); }, {"pair_frequencies", "[0, 1, -1, 2]"});
  expect_error(
      [&] { make(RotaryEmbeddingOptions(8).pair_axes({0, 1, 0, 1}).sections({2, 2})); },
      {"sections or pair_axes", "both"});
  RotaryEmbedding rope(RotaryEmbeddingOptions(8).pair_axes({0, 1, 0, 1}));
  expect_error(
      [&] { rope->rotate(at::zeros({2, 5, 4, 8}), at::zeros({3, 2, 5}, at::kLong)); },
      {"axis for each of the 2 axes of pair_axes", "got [3, 2, 5]"});
}

TEST(RotaryEmbeddingConjugate, TurnsBackInEveryMethod) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{8});
  RotaryEmbedding back(RotaryEmbeddingOptions(8).conjugate(true));
  const at::Tensor x = at::randn({2, 5, 3, 8}, at::kDouble);
  const auto expect_x = [&x](const at::Tensor& y) { EXPECT_TRUE(at::allclose(y, x, 1e-12, 1e-12)); };
  const at::Tensor turned = rope->rotate(x);
  EXPECT_FALSE(at::allclose(turned, x));
  expect_x(back->rotate(turned));
  const auto [q, k] = back->forward(turned, turned);
  expect_x(q);
  expect_x(k);
  const auto qkv = back->forward_qkv(at::stack({turned, turned, x}, 2), 3, 3);
  expect_x(std::get<0>(qkv));
  expect_x(std::get<1>(qkv));
  at::Tensor in_place = turned.clone();
  back->rotate_(in_place);
  expect_x(in_place);
  at::Tensor other = turned.clone();
  in_place = turned.clone();
  back->forward_(in_place, other);
  expect_x(in_place);
  expect_x(other);
}

TEST(RotaryEmbeddingPackedProjection, ThatDoesNotFitIsAnError) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const auto expect_rejected = [&](const at::Tensor& qkv, int64_t q_heads, int64_t kv_heads) {
    expect_error(
        [&] { rope->forward_qkv(qkv, q_heads, kv_heads); },
        {"posenc::RotaryEmbedding: ", "expected qkv", "(num_q_heads + 2 num_kv_heads) head_dim"});
  };
  expect_rejected(at::zeros({2, 5, 128}), 4, 1);
  expect_rejected(at::zeros({5, 128}), 4, 2);
  expect_rejected(at::zeros({2, 5, 3, 4, 8}), 4, 4);
  expect_error([&] { rope->forward_qkv(at::Tensor(), 4, 2); }, {"expected qkv", "undefined"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Tables

class RotaryEmbeddingTables : public DeviceTest {
 protected:
  at::Tensor random(int64_t tokens) const { return random_tensor({1, tokens, 2, kHeadDim}, {GetParam(), at::kFloat}); }
  static RotaryEmbeddingOptions options(int64_t length) {
    return RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(length);
  }
  at::Tensor positions(const std::vector<int64_t>& values) const { return at::tensor(values, at::kLong).to(device()); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingTables, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingTables, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryEmbeddingTables, AreBuiltWhenFirstNeeded) {
  RotaryEmbedding rope(options(32));
  EXPECT_EQ(rope->table_length(device()), 0);
  rope->rotate(random(3));
  EXPECT_EQ(rope->table_length(device()), 32);
  EXPECT_EQ(rope->table_length(device(), at::kDouble), 0);
  rope->rotate(random(3).to(at::kDouble));
  EXPECT_EQ(rope->table_length(device(), at::kDouble), 32);
}

TEST_P(RotaryEmbeddingTables, GrowByDoubling) {
  RotaryEmbedding rope(options(8));
  rope->rotate(random(8));
  EXPECT_EQ(rope->table_length(device()), 8);
  const at::Tensor longer = random(9);
  expect_rotated(rope->rotate(longer), longer, options(8), std::nullopt, 9);
  EXPECT_EQ(rope->table_length(device()), 16);
  const at::Tensor much_longer = random(100);
  expect_rotated(rope->rotate(much_longer), much_longer, options(8), std::nullopt, 100);
  EXPECT_GE(rope->table_length(device()), 100);
  EXPECT_LT(rope->table_length(device()), 200);
}

TEST_P(RotaryEmbeddingTables, AreNotBuiltAgainInTheSteadyState) {
  const LogLevel before = log_level();
  set_log_level(LogLevel::debug);
  RotaryEmbedding rope(options(8));
  const at::Tensor x = random(20);
  const at::Tensor p = at::arange(20).to(device());
  const std::string line = "RotaryEmbedding: built";
  const auto lines_about_tables = [&line](const std::function<void()>& action) {
    ::testing::internal::CaptureStderr();
    action();
    const std::string text = ::testing::internal::GetCapturedStderr();
    int count = 0;
    for (size_t at = text.find(line); at != std::string::npos; at = text.find(line, at + 1)) {
      ++count;
    }
    return count;
  };
  EXPECT_EQ(lines_about_tables([&] { rope->rotate(x); }), 1);
  EXPECT_EQ(
      lines_about_tables([&] {
        for (int i = 0; i < 3; ++i) {
          rope->rotate(x);
          rope->forward(x, x, p);
          rope->to(at::kBFloat16);
        }
      }),
      0);
  set_log_level(before);
}

TEST_P(RotaryEmbeddingTables, ReserveBuildsThem) {
  RotaryEmbedding rope(options(8));
  rope->reserve(1000, device());
  const int64_t length = rope->table_length(device());
  EXPECT_GE(length, 1000);
  rope->reserve(10, device());
  rope->rotate(random(1000));
  EXPECT_EQ(rope->table_length(device()), length);
  // float16 inputs use float32 tables.
  EXPECT_EQ(rope->table_length(device(), at::kHalf), length);
  rope->reserve(100, device(), at::kDouble);
  EXPECT_GE(rope->table_length(device(), at::kDouble), 100);
}

TEST_P(RotaryEmbeddingTables, ReserveRejectsNegativeLengths) {
  RotaryEmbedding rope(options(8));
  expect_error([&] { rope->reserve(-1, device()); }, {"length", "-1"});
}

TEST_P(RotaryEmbeddingTables, ReservedPositionsAreRight) {
  RotaryEmbedding rope(options(8));
  rope->reserve(6000, device());
  const at::Tensor x = random(3);
  const at::Tensor p = positions({5999, 4096, 17});
  expect_rotated(rope->rotate(x, p), x, options(8), p, 6000);
}

TEST_P(RotaryEmbeddingTables, EmptyOptionStillGrows) {
  RotaryEmbedding rope(options(1));
  const at::Tensor x = random(3);
  expect_rotated(rope->rotate(x), x, options(1), std::nullopt, 3);
}

TEST_P(RotaryEmbeddingTables, AreSharedByClones) {
  RotaryEmbedding rope(options(8));
  const at::Tensor x = random(8);
  const at::Tensor expected = rope->rotate(x);
  const auto copy = std::dynamic_pointer_cast<posenc::RotaryEmbeddingImpl>(rope->clone());
  ASSERT_TRUE(copy);
  EXPECT_EQ(copy->table_length(device()), 8);
  expect_same_bits(copy->rotate(x), expected);
  const at::Tensor longer = random(50);
  expect_rotated(copy->rotate(longer), longer, options(8), std::nullopt, 50);
  expect_same_bits(rope->rotate(x), expected);
  expect_rotated(rope->rotate(longer), longer, options(8), std::nullopt, 50);
}

TEST_P(RotaryEmbeddingTables, OfACloneOutliveTheOriginal) {
  std::shared_ptr<posenc::RotaryEmbeddingImpl> copy;
  const at::Tensor x = random(8);
  at::Tensor expected;
  {
    RotaryEmbedding rope(options(8));
    expected = rope->rotate(x);
    copy = std::dynamic_pointer_cast<posenc::RotaryEmbeddingImpl>(rope->clone(device()));
  }
  expect_same_bits(copy->rotate(x), expected);
}

TEST_P(RotaryEmbeddingTables, FollowChangedOptionsAfterReset) {
  RotaryEmbedding rope(options(8));
  const at::Tensor x = random(8);
  rope->rotate(x);
  rope->options.base(77).interleaved(true);
  rope->reset();
  EXPECT_EQ(rope->table_length(device()), 0);
  expect_rotated(rope->rotate(x), x, options(8).base(77).interleaved(true), std::nullopt, 8);
  for (const int64_t length : {4, 6}) {  // fewer rows than before, then more
    rope->options.max_position_embeddings(length);
    rope->reset();
    EXPECT_EQ(rope->table_length(device()), 0);
    rope->rotate(random(3));
    EXPECT_EQ(rope->table_length(device()), length);
  }
}

TEST_P(RotaryEmbeddingTables, ChangedOptionsAreCheckedByReset) {
  RotaryEmbedding rope(options(8));
  rope->options.rotary_dim(3);
  expect_error([&] { rope->reset(); }, {"rotary_dim", "3"});
}

TEST_P(RotaryEmbeddingTables, OfACloneWithOtherOptionsLeaveTheOriginalAlone) {
  RotaryEmbedding rope(options(8));
  const at::Tensor x = random(8);
  const at::Tensor expected = rope->rotate(x);
  const auto copy = std::dynamic_pointer_cast<posenc::RotaryEmbeddingImpl>(rope->clone());
  copy->options.base(77);
  copy->reset();
  expect_rotated(copy->rotate(x), x, options(8).base(77), std::nullopt, 8);
  expect_same_bits(rope->rotate(x), expected);
}

TEST_P(RotaryEmbeddingTables, SurviveSaveAndLoad) {
  RotaryEmbedding rope(options(8));
  const at::Tensor x = random(20);
  const at::Tensor expected = rope->rotate(x);
  std::stringstream stream;
  torch::save(rope, stream);
  RotaryEmbedding loaded(options(8));
  torch::load(loaded, stream);
  expect_same_bits(loaded->rotate(x), expected);
  expect_same_bits(rope->rotate(x), expected);
}

TEST_P(RotaryEmbeddingTables, BuiltInInferenceModeServeTraining) {
  RotaryEmbedding rope(options(8));
  const at::Tensor x = random(4);
  at::Tensor expected;
  {
    const c10::InferenceMode inference;
    expected = rope->rotate(x).clone();
  }
  const at::Tensor leaf = x.clone().requires_grad_();
  const at::Tensor y = rope->rotate(leaf);
  expect_same_bits(y, expected);
  y.sum().backward();
  EXPECT_TRUE(leaf.grad().defined());
}

TEST_P(RotaryEmbeddingTables, SeveralThreadsMayUseOneModule) {
  constexpr int kThreads = 4;
  RotaryEmbedding rope(options(4));
  std::vector<at::Tensor> inputs;
  inputs.reserve(kThreads);
  std::vector<at::Tensor> outputs(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    inputs.push_back(random(400));
  }
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      // Every thread grows the tables many times, so that threads grow them concurrently.
      for (int64_t tokens = 1; tokens < 400; tokens += 7 + t) {
        rope->rotate(inputs[static_cast<size_t>(t)].narrow(1, 0, tokens));
      }
      outputs[static_cast<size_t>(t)] = rope->rotate(inputs[static_cast<size_t>(t)]);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (size_t t = 0; t < kThreads; ++t) {
    expect_rotated(outputs[t], inputs[t], options(4), std::nullopt, 400);
  }
}

TEST_P(RotaryEmbeddingTables, WrongHeadSizeIsAnError) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).rotary_dim(4));
  const at::Tensor x = random_tensor({1, 3, 2, 24}, {GetParam(), at::kFloat});
  expect_error([&] { rope->rotate(x); }, {"head size of 16", "[1, 3, 2, 24]"});
  expect_error([&] { rope->forward(x, x); }, {"head size of 16", "[1, 3, 2, 24]"});
}

TEST_P(RotaryEmbeddingTables, WrongNumberOfDimensionsIsAnError) {
  const at::Tensor x = random(3);
  RotaryEmbedding packed(RotaryEmbeddingOptions(kHeadDim).layout(Layout::thd));
  expect_error([&] { packed->rotate(x); }, {"[1, 3, 2, 16]"});
  for (const Layout layout : {Layout::bshd, Layout::sbhd, Layout::bhsd}) {
    RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).layout(layout));
    expect_error([&] { rope->rotate(x[0]); }, {"[3, 2, 16]"});
    expect_error([&] { rope->rotate(x[0][0][0]); }, {"[16]"});
  }
}

TEST_P(RotaryEmbeddingTables, UndefinedInputsAreAnError) {
  RotaryEmbedding rope(options(8));
  expect_error([&] { rope->rotate(at::Tensor()); }, {"undefined"});
  expect_error([&] { rope->forward(random(3), at::Tensor()); }, {"undefined"});
  expect_error([&] { rope->forward(at::Tensor(), random(3)); }, {"undefined"});
}

TEST_P(RotaryEmbeddingTables, BadPositionsAreAnError) {
  RotaryEmbedding rope(options(8));
  const at::Tensor x = random(3);
  expect_error([&] { rope->rotate(x, at::zeros({3}, x.options())); }, {"positions", "Float"});
  expect_error([&] { rope->rotate(x, positions({1, 2})); }, {"positions", "[2]"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Positions on the CPU, and positions on a GPU, whose values the host does not read

TEST(RotaryEmbeddingHostPositions, GrowTheTables) {
  const auto options = RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8);
  RotaryEmbedding rope(options);
  const at::Tensor x = at::randn({1, 3, 2, kHeadDim});
  for (const at::ScalarType dtype : {at::kInt, at::kLong}) {
    const at::Tensor p = at::tensor({3000, 5, 2047}, dtype);
    expect_rotated(rope->rotate(x, p), x, options, p, 3001);
  }
  EXPECT_GE(rope->table_length(at::kCPU), 3001);
}

TEST(RotaryEmbeddingHostPositions, BeyondAnyTableAreAnError) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8));
  for (const int64_t position : {int64_t{1} << 40, std::numeric_limits<int64_t>::max()}) {
    const at::Tensor p = at::tensor({int64_t{0}, position, int64_t{2}}, at::kLong);
    expect_error([&] { rope->rotate(at::zeros({1, 3, 2, kHeadDim}), p); }, {"positions", std::to_string(position)});
  }
  EXPECT_LE(rope->table_length(at::kCPU), 8);
}

TEST(RotaryEmbeddingHostPositions, BelowZeroAreAnError) {
  for (const bool learnable : {false, true}) {
    RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8).learnable_frequencies(learnable));
    at::Tensor x = at::randn({2, 3, 2, kHeadDim});
    for (const at::ScalarType dtype : {at::kInt, at::kLong}) {
      // Positions computed from an attention mask by cumsum - 1 are -1 for padding.
      const at::Tensor p = at::tensor({0, 1, 2, -1, -1, 0}, dtype).view({2, 3});
      const std::vector<std::string> parts{"expected positions of at least 0", "got -1 at index [1, 0]"};
      expect_error([&] { rope->forward(x, x, p); }, parts);
      expect_error([&] { rope->rotate(x, p); }, parts);
      expect_error([&] { rope->rotate_(x, p); }, parts);
      expect_error([&] { rope->forward_qkv(at::stack({x, x, x}, 2), 2, 2, p); }, parts);
      expect_error([&] { rope->tables_for(x, p); }, parts);
    }
    const auto lowest = std::numeric_limits<int64_t>::min();
    expect_error([&] { rope->rotate(x, at::tensor({int64_t{0}, int64_t{1}, lowest}, at::kLong)); }, {"at index [2]"});
  }
}

class RotaryEmbeddingDevicePositions : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingDevicePositions, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryEmbeddingDevicePositions, BeyondTheTablesGiveNan) {
  RotaryEmbedding rope(RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8));
  const at::Tensor x = at::randn({1, 3, 2, kHeadDim}).to(device());
  const at::Tensor y = rope->rotate(x, at::tensor({0, 3000, 2}, at::kLong).to(device()));
  EXPECT_TRUE(y.select(1, 1).isnan().all().item<bool>());
  EXPECT_FALSE(y.select(1, 2).isnan().any().item<bool>());
  EXPECT_EQ(rope->table_length(device()), 8);
}

TEST_P(RotaryEmbeddingDevicePositions, TablesLivePerDevice) {
  if (at::detail::getCUDAHooks().deviceCount() < 2) {
    GTEST_SKIP() << "needs two CUDA devices";
  }
  const auto options = RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(8);
  RotaryEmbedding rope(options);
  const at::Tensor x = at::randn({1, 30, 2, kHeadDim});
  for (const int index : {1, 0, 1}) {
    const at::Device gpu(at::kCUDA, static_cast<at::DeviceIndex>(index));
    const at::Tensor y = rope->rotate(x.to(gpu));
    EXPECT_EQ(y.device(), gpu);
    expect_rotated(y, x, options, std::nullopt, 30);
    EXPECT_GE(rope->table_length(gpu), 30);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// As a submodule

/// A model that keeps the embedding as a submodule.
class AttentionImpl : public torch::nn::Cloneable<AttentionImpl> {
 public:
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as LibTorch's own modules do
  AttentionImpl() { reset(); }
  void reset() override {
    rope = register_module("rope", RotaryEmbedding(RotaryEmbeddingOptions{kHeadDim}));
    weight = register_parameter("weight", at::ones({kHeadDim}));
  }
  RotaryEmbedding rope{nullptr};
  at::Tensor weight;
};

TEST(RotaryEmbeddingSubmodule, HasNoParametersAndNoBuffers) {
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  rope->reserve(10, at::kCPU);
  EXPECT_TRUE(rope->parameters().empty());
  EXPECT_TRUE(rope->buffers().empty());
  const AttentionImpl model;
  EXPECT_EQ(model.parameters().size(), 1U);
  EXPECT_TRUE(model.buffers().empty());
}

TEST(RotaryEmbeddingSubmodule, IsConvertedClonedAndSavedWithItsParent) {
  const auto model = std::make_shared<AttentionImpl>();
  const at::Tensor x = at::randn({1, 6, 2, kHeadDim});
  const at::Tensor expected = model->rope->rotate(x);
  model->to(at::kBFloat16);
  EXPECT_EQ(model->weight.scalar_type(), at::kBFloat16);
  expect_same_bits(model->rope->rotate(x), expected);

  const auto copy = std::dynamic_pointer_cast<AttentionImpl>(model->clone());
  expect_same_bits(copy->rope->rotate(x), expected);

  std::stringstream stream;
  torch::serialize::OutputArchive out;
  model->save(out);
  out.save_to(stream);
  torch::serialize::InputArchive in;
  in.load_from(stream);
  AttentionImpl loaded;
  loaded.to(at::kBFloat16);
  loaded.load(in);
  expect_same_bits(loaded.rope->rotate(x), expected);
}

TEST(RotaryEmbeddingSubmodule, WorksInAnyModuleWithDefaultPositions) {
  torch::nn::AnyModule any(RotaryEmbedding(RotaryEmbeddingOptions{kHeadDim}));
  const at::Tensor x = at::randn({1, 6, 2, kHeadDim});
  RotaryEmbedding rope(RotaryEmbeddingOptions{kHeadDim});
  const auto [q, k] = any.forward<std::tuple<at::Tensor, at::Tensor>>(x, x);
  expect_same_bits(q, rope->rotate(x));
  expect_same_bits(k, q);
}

TEST(RotaryEmbeddingSubmodule, PrintsItsOptions) {
  std::ostringstream stream;
  stream << *RotaryEmbedding(
      RotaryEmbeddingOptions(64).rotary_dim(32).base(500000).interleaved(true).layout(Layout::bhsd));
  const std::string text = stream.str();
  for (const char* part :
       {"posenc::RotaryEmbedding(", "head_dim=64", "rotary_dim=32", "base=500000", "max_position_embeddings=2048",
        "interleaved=true", "layout=bhsd", "learnable_frequencies=false"}) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in: " << text;
  }
  std::ostringstream of_pairs;
  of_pairs << *RotaryEmbedding(RotaryEmbeddingOptions(4).pair_axes({0, 1}).pair_frequencies({0, 0}).conjugate(true));
  EXPECT_NE(of_pairs.str().find("pair_axes=[0, 1], pair_frequencies=[0, 0], conjugate=true)"), std::string::npos)
      << of_pairs.str();
}

}  // namespace
}  // namespace posenc::test
