#include "rotary_embedding_module_support.h"

#include <posenc/frequencies.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

using posenc::Layout;
using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

constexpr int64_t kHeadDim = 16;

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

}  // namespace
}  // namespace posenc::test
