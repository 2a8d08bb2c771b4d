#include "support.h"

#include <posenc/modules/rotary_embedding.h>

#include <ATen/ATen.h>
#include <torch/nn/modules/container/any.h>
#include <torch/serialize.h>

#include <limits>
#include <sstream>

// Options of the module RotaryEmbedding, and its use as a submodule.
namespace posenc::test {
namespace {

using posenc::Layout;
using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

constexpr int64_t kHeadDim = 16;

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
