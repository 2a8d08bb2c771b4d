#include "gradcheck.h"
#include "qk_norm_support.h"

#include <posenc/frequencies.h>
#include <posenc/modules/qk_norm_rotary_embedding.h>
#include <posenc/qk_norm_rotary_embedding.h>

#include <ATen/ATen.h>
#include <torch/nn/modules/container/any.h>
#include <torch/serialize.h>

#include <limits>
#include <sstream>

namespace posenc::test {
namespace {

using posenc::Layout;
using posenc::QKNormRotaryEmbedding;
using posenc::QKNormRotaryEmbeddingOptions;
using posenc::RotaryEmbeddingOptions;

constexpr int64_t kHeadDim = 16;

/// Arguments of the operator that correspond to `module->forward(q, k)` without positions.
QKNormInputs arguments_of(const QKNormRotaryEmbedding& module, const at::Tensor& q, const at::Tensor& k) {
  const RotaryEmbeddingOptions& rotary = module->options.rotary();
  const int64_t rotary_dim = rotary.rotary_dim().value_or(rotary.head_dim());
  const auto [cos, sin] = posenc::rotary_tables(
      posenc::rotary_inv_freq(rotary_dim, rotary.base()), q.size(-3), table_dtype(q.scalar_type()));
  QKNormInputs in;
  in.rotary.q = q;
  in.rotary.k = k;
  in.rotary.cos = cos.to(q.device());
  in.rotary.sin = sin.to(q.device());
  in.rotary.interleaved = rotary.interleaved();
  in.rotary.conjugate = rotary.conjugate();
  in.q_weight = module->q_weight;
  in.k_weight = module->k_weight;
  in.eps = module->options.eps();
  in.unit_offset = module->options.unit_offset();
  return in;
}

void randomize(const QKNormRotaryEmbedding& module) {
  const at::NoGradGuard no_grad;
  for (const at::Tensor& weight : {module->q_weight, module->k_weight}) {
    weight.copy_(at::randn(weight.sizes()));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Options and parameters

TEST(QKNormRotaryEmbeddingModuleOptions, HaveTheirDefaults) {
  const QKNormRotaryEmbeddingOptions options(128);
  EXPECT_EQ(options.rotary().head_dim(), 128);
  EXPECT_EQ(options.eps(), 1e-6);
  EXPECT_FALSE(options.unit_offset());
}

TEST(QKNormRotaryEmbeddingModuleOptions, BadOnesAreRejected) {
  const auto expect_rejected = [](const QKNormRotaryEmbeddingOptions& options, const std::vector<std::string>& parts) {
    expect_error([&] { QKNormRotaryEmbedding module(options); }, parts);
  };
  expect_rejected(QKNormRotaryEmbeddingOptions(16).eps(0), {"posenc::QKNormRotaryEmbedding", "eps", "0"});
  expect_rejected(
      QKNormRotaryEmbeddingOptions(16).eps(std::numeric_limits<double>::quiet_NaN()), {"positive, finite eps", "nan"});
  expect_rejected(QKNormRotaryEmbeddingOptions(0), {"head_dim", "0"});
  expect_rejected(RotaryEmbeddingOptions(16).rotary_dim(18), {"rotary_dim", "18"});
}

TEST(QKNormRotaryEmbeddingModuleParameters, StartAtOneOrWithTheOffsetAtZero) {
  const QKNormRotaryEmbedding plain(kHeadDim);
  const QKNormRotaryEmbedding offset(QKNormRotaryEmbeddingOptions(kHeadDim).unit_offset(true));
  for (const at::Tensor& weight : {plain->q_weight, plain->k_weight}) {
    expect_same_bits(weight, at::ones({kHeadDim}));
    EXPECT_TRUE(weight.requires_grad());
  }
  for (const at::Tensor& weight : {offset->q_weight, offset->k_weight}) {
    expect_same_bits(weight, at::zeros({kHeadDim}));
  }
  std::vector<std::string> names;
  for (const auto& parameter : plain->named_parameters()) {
    names.push_back(parameter.key());
  }
  EXPECT_EQ(names, (std::vector<std::string>{"q_weight", "k_weight"}));
}

TEST(QKNormRotaryEmbeddingModuleParameters, AreConvertedWithTheModuleAndTheTablesAreNot) {
  QKNormRotaryEmbedding module(kHeadDim);
  module->to(at::kBFloat16);
  EXPECT_EQ(module->q_weight.scalar_type(), at::kBFloat16);
  const at::Tensor q = at::randn({1, 3, 2, kHeadDim}).to(at::kBFloat16);
  EXPECT_EQ(std::get<0>(module->rotary->tables_for(q)).scalar_type(), at::kFloat);
  EXPECT_EQ(std::get<0>(module->forward(q, q)).scalar_type(), at::kBFloat16);
}

TEST(QKNormRotaryEmbeddingModuleParameters, StartAnewWithReset) {
  QKNormRotaryEmbedding module(kHeadDim);
  randomize(module);
  module->options.unit_offset(true).rotary(RotaryEmbeddingOptions(8));
  module->reset();
  expect_same_bits(module->q_weight, at::zeros({8}));
  EXPECT_EQ(module->rotary->options.head_dim(), 8);
  EXPECT_EQ(module->parameters().size(), 2U);
}

// ---------------------------------------------------------------------------------------------------------------------
// Every dtype

class QKNormRotaryEmbeddingModule : public TargetTest {
 protected:
  at::Tensor random(at::IntArrayRef sizes) const { return random_tensor(sizes, GetParam()); }

  /// A module with random weights. Their dtype is that of q and k if `converted`, else that of the arithmetic.
  QKNormRotaryEmbedding make(const QKNormRotaryEmbeddingOptions& options, bool converted = false) const {
    QKNormRotaryEmbedding module(options);
    randomize(module);
    module->to(device(), converted ? dtype() : table_dtype(dtype()));
    return module;
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, QKNormRotaryEmbeddingModule, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, QKNormRotaryEmbeddingModule, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(QKNormRotaryEmbeddingModule, ForwardIsTheOperatorWithItsTables) {
  for (const bool converted : {false, true}) {
    for (const bool other : {false, true}) {
      const auto rotary = RotaryEmbeddingOptions(kHeadDim).rotary_dim(8).base(500).interleaved(other).conjugate(other);
      auto module = make(QKNormRotaryEmbeddingOptions(rotary).eps(1e-3).unit_offset(other), converted);
      const at::Tensor q = random({2, 5, 4, kHeadDim});
      const at::Tensor k = random({2, 5, 2, kHeadDim});
      const auto [q_out, k_out] = module->forward(q, k);
      const QKNormInputs in = arguments_of(module, q, k);
      const auto [expected_q, expected_k] = qk_norm_rotate(in);
      expect_same_bits(q_out, expected_q);
      expect_same_bits(k_out, expected_k);
      expect_within(q_out, scalar_qk_norm(in, q, module->q_weight));
    }
  }
}

TEST_P(QKNormRotaryEmbeddingModule, LayoutsAreViewsOfOneAnother) {
  const at::Tensor q = random({2, 5, 4, kHeadDim});
  const at::Tensor k = random({2, 5, 2, kHeadDim});
  const auto with = [&](Layout layout) {
    QKNormRotaryEmbedding module(RotaryEmbeddingOptions(kHeadDim).layout(layout));
    module->to(device(), table_dtype(dtype()));
    return module;
  };
  const auto [expected_q, expected_k] = with(Layout::bshd)->forward(q, k);
  for (const auto& [layout, a, b] : {std::tuple(Layout::sbhd, 0, 1), std::tuple(Layout::bhsd, 1, 2)}) {
    const auto [q_out, k_out] = with(layout)->forward(q.transpose(a, b), k.transpose(a, b));
    expect_same_bits(q_out.transpose(a, b), expected_q);
    expect_same_bits(k_out.transpose(a, b), expected_k);
  }
  expect_same_bits(std::get<0>(with(Layout::thd)->forward(q[0], k[0])), expected_q[0]);
}

TEST_P(QKNormRotaryEmbeddingModule, PositionsChooseTheRowsOfTheTables) {
  auto module = make(kHeadDim);
  const at::Tensor q = random({1, 3, 2, kHeadDim});
  const at::Tensor k = random({1, 3, 1, kHeadDim});
  QKNormInputs in = arguments_of(module, q, k);
  in.rotary.positions = at::tensor({2, 0, 1}, at::kLong).to(device());
  const auto [q_out, k_out] = module->forward(q, k, in.rotary.positions);
  const auto [expected_q, expected_k] = qk_norm_rotate(in);
  expect_same_bits(q_out, expected_q);
  expect_same_bits(k_out, expected_k);
}

TEST_P(QKNormRotaryEmbeddingModule, SectionsChooseTheAxesOfThePositions) {
  auto module = make(RotaryEmbeddingOptions(kHeadDim).sections({4, 2, 2}));
  const at::Tensor q = random({1, 3, 2, kHeadDim});
  const at::Tensor k = random({1, 3, 1, kHeadDim});
  QKNormInputs in = arguments_of(module, q, k);
  in.rotary.positions = at::tensor({2, 0, 1, 1, 1, 0, 0, 2, 2}, at::kLong).view({3, 1, 3}).to(device());
  in.rotary.pair_axes = {0, 0, 0, 0, 1, 1, 2, 2};
  const auto [q_out, k_out] = module->forward(q, k, in.rotary.positions);
  const auto [expected_q, expected_k] = qk_norm_rotate(in);
  expect_same_bits(q_out, expected_q);
  expect_same_bits(k_out, expected_k);
}

TEST_P(QKNormRotaryEmbeddingModule, SeqLenReachesTheTables) {
  auto module = make(RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(4));
  const at::Tensor q = random({1, 1, 2, kHeadDim});
  const at::Tensor position = at::tensor({99}, at::kLong).to(device());
  const at::Tensor q_out = std::get<0>(module->forward(q, q, position, /*seq_len=*/100));
  EXPECT_FALSE(q_out.isnan().any().item<bool>());
}

TEST_P(QKNormRotaryEmbeddingModule, GradientsReachTheWeights) {
  auto module = make(kHeadDim);
  const at::Tensor q = random({2, 5, 4, kHeadDim}).requires_grad_();
  const at::Tensor k = random({2, 5, 2, kHeadDim});
  const at::Tensor q_out = std::get<0>(module->forward(q, k));
  const at::Tensor grad = random(q_out.sizes());
  torch::autograd::backward({q_out}, {grad});
  const ExpectedGradients expected = scalar_qk_norm_gradients(arguments_of(module, q, k), q, module->q_weight, grad);
  expect_within(q.grad(), expected.input);
  expect_within(module->q_weight.grad(), expected.weight);
}

// ---------------------------------------------------------------------------------------------------------------------
// As a module of LibTorch

TEST(QKNormRotaryEmbeddingAsModule, PrintsItsOptions) {
  const QKNormRotaryEmbedding module(QKNormRotaryEmbeddingOptions(128).eps(0.5).unit_offset(true));
  std::ostringstream text;
  module->pretty_print(text);
  EXPECT_EQ(text.str(), "posenc::QKNormRotaryEmbedding(head_dim=128, eps=0.5, unit_offset=true)");
}

TEST(QKNormRotaryEmbeddingAsModule, CloneHasParametersOfItsOwnAndSharesTheTables) {
  QKNormRotaryEmbedding module(kHeadDim);
  randomize(module);
  const at::Tensor q = at::randn({1, 3, 2, kHeadDim});
  const auto [q_out, k_out] = module->forward(q, q);
  const auto clone = std::dynamic_pointer_cast<posenc::QKNormRotaryEmbeddingImpl>(module->clone());
  ASSERT_NE(clone, nullptr);
  const auto [q_clone, k_clone] = clone->forward(q, q);
  expect_same_bits(q_clone, q_out);
  expect_same_bits(k_clone, k_out);
  EXPECT_FALSE(clone->q_weight.is_alias_of(module->q_weight));
  EXPECT_TRUE(std::get<0>(clone->rotary->tables_for(q)).is_alias_of(std::get<0>(module->rotary->tables_for(q))));
}

TEST(QKNormRotaryEmbeddingAsModule, SavedParametersAreLoaded) {
  QKNormRotaryEmbedding saved(kHeadDim);
  randomize(saved);
  std::stringstream stream;
  torch::save(saved, stream);
  QKNormRotaryEmbedding loaded(kHeadDim);
  torch::load(loaded, stream);
  expect_same_bits(loaded->q_weight, saved->q_weight);
  expect_same_bits(loaded->k_weight, saved->k_weight);
}

TEST(QKNormRotaryEmbeddingAsModule, WorksInAnAnyModule) {
  QKNormRotaryEmbedding module(kHeadDim);
  const at::Tensor q = at::randn({1, 3, 2, kHeadDim});
  torch::nn::AnyModule any(module);
  const auto result = any.forward<std::tuple<at::Tensor, at::Tensor>>(q, q);
  expect_same_bits(std::get<0>(result), std::get<0>(module->forward(q, q)));
}

TEST(QKNormRotaryEmbeddingAsModule, BadInputsNameTheModule) {
  QKNormRotaryEmbedding module(kHeadDim);
  const at::Tensor good = at::randn({1, 3, 2, kHeadDim});
  expect_error(
      [&] { module->forward(at::Tensor(), good); }, {"posenc::QKNormRotaryEmbedding: expected q", "undefined"});
  expect_error(
      [&] { module->forward(good, good[0]); },
      {"posenc::QKNormRotaryEmbedding: expected k in layout bshd", "4 dimensions", "got [3, 2, 16]"});
  expect_error([&] { module->forward(good.narrow(-1, 0, 8), good); }, {"expected q", "head size of 16"});
}

}  // namespace
}  // namespace posenc::test
