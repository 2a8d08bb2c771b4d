#include "alibi_support.h"
#include "gradcheck.h"

#include <posenc/modules/alibi_bias.h>

#include <ATen/ATen.h>
#include <torch/nn/modules/container/any.h>
#include <torch/serialize.h>

#include <cmath>
#include <limits>
#include <sstream>
#include <thread>

namespace posenc::test {
namespace {

using posenc::ALiBiBias;
using posenc::ALiBiBiasOptions;

// ---------------------------------------------------------------------------------------------------------------------
// Options

void expect_rejected(const ALiBiBiasOptions& options, const std::vector<std::string>& parts) {
  expect_error([&] { ALiBiBias module(options); }, parts);
}

TEST(AlibiOptions, HaveTheDefaultsOfThePaper) {
  const ALiBiBiasOptions options(12);
  EXPECT_EQ(options.num_heads(), 12);
  EXPECT_FALSE(options.causal());
  EXPECT_EQ(options.max_bias(), 8.0);
  EXPECT_FALSE(options.slopes().defined());
  EXPECT_FALSE(options.learnable());
  EXPECT_EQ(options.head_offset(), 0);
  EXPECT_FALSE(options.total_heads().has_value());
}

TEST(AlibiOptions, WithBadHeadsAreRejected) {
  expect_rejected(ALiBiBiasOptions(0), {"num_heads", "0"});
  expect_rejected(ALiBiBiasOptions(-4), {"num_heads", "-4"});
}

TEST(AlibiOptions, WithBadMaxBiasAreRejected) {
  expect_rejected(ALiBiBiasOptions(4).max_bias(0), {"max_bias", "0"});
  expect_rejected(ALiBiBiasOptions(4).max_bias(-8), {"max_bias", "-8"});
  expect_rejected(ALiBiBiasOptions(4).max_bias(std::nan("")), {"max_bias", "nan"});
}

TEST(AlibiOptions, WithHeadsOutsideTheModelAreRejected) {
  expect_rejected(ALiBiBiasOptions(4).head_offset(-1), {"head_offset", "-1"});
  expect_rejected(ALiBiBiasOptions(4).total_heads(3), {"total_heads", "3"});
  expect_rejected(ALiBiBiasOptions(4).head_offset(5).total_heads(8), {"head_offset", "total_heads", "5", "8"});
  expect_rejected(ALiBiBiasOptions(4).head_offset(1), {"head_offset", "total_heads"});
  expect_rejected(
      ALiBiBiasOptions(4).head_offset(std::numeric_limits<int64_t>::max()).total_heads(8), {"head_offset", "8"});
}

TEST(AlibiOptions, WithBadSlopesAreRejected) {
  expect_rejected(ALiBiBiasOptions(4).slopes(at::ones({3})), {"slopes", "[4]", "[3]"});
  expect_rejected(ALiBiBiasOptions(4).slopes(at::ones({4, 1})), {"slopes", "[4, 1]"});
  expect_rejected(ALiBiBiasOptions(2).total_heads(4).slopes(at::ones({2})), {"slopes", "[4]", "[2]"});
  expect_rejected(ALiBiBiasOptions(4).slopes(at::ones({4}, at::kLong)), {"slopes", "Long"});
}

// ---------------------------------------------------------------------------------------------------------------------
// Every dtype

class AlibiModule : public TargetTest {
 protected:
  static constexpr int64_t kHeads = 3;

  /// Scores `[2, 3, 5, 7]` and the slopes of the module.
  AlibiInputs inputs() const {
    AlibiInputs in = make_alibi_inputs(AlibiCase(), GetParam());
    in.slopes = posenc::alibi_slopes(kHeads).to(device());
    return in;
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiModule, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiModule, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(AlibiModule, IsItsOperators) {
  for (const bool causal : {false, true}) {
    for (const bool learnable : {false, true}) {
      AlibiInputs in = inputs();
      in.causal = causal;
      ALiBiBias alibi(ALiBiBiasOptions(kHeads).causal(causal).learnable(learnable));
      alibi->to(device());
      expect_same_bits(alibi->forward(in.scores), add_of(in));
      expect_same_bits(alibi->add(in.scores), add_of(in));
      expect_same_bits(alibi->bias(5, 7, dtype(), device()), bias_of(in, dtype()));
      in.scale = 0.25;
      in.key_padding_mask = random_mask(2, 7, GetParam().device);
      expect_same_bits(alibi->softmax(in.scores, in.scale, in.key_padding_mask), softmax_of(in));
      for (const int64_t offset : {1, -2}) {
        in.query_offset = offset;
        expect_same_bits(alibi->add(in.scores, offset), add_of(in));
        expect_same_bits(alibi->bias(5, 7, dtype(), device(), offset), bias_of(in, dtype()));
        expect_same_bits(alibi->softmax(in.scores, in.scale, in.key_padding_mask, offset), softmax_of(in));
      }
    }
  }
}

TEST_P(AlibiModule, ConvertedToBFloat16KeepsSlopesOfFloat32) {
  // Slopes of 12 heads are not representable in bfloat16, so casting them with the model would change them.
  AlibiCase c;
  c.heads = 12;
  c.batch = 1;
  c.q_len = 2;
  c.k_len = 8192;
  AlibiInputs in = make_alibi_inputs(c, GetParam());
  in.slopes = posenc::alibi_slopes(12).to(device());
  for (const bool learnable : {false, true}) {
    ALiBiBias alibi(ALiBiBiasOptions(12).learnable(learnable));
    alibi->to(at::kBFloat16);
    alibi->to(device());
    alibi->to(device(), at::kHalf);
    expect_same_bits(alibi->slopes_on(device()), in.slopes);
    expect_same_bits(alibi->forward(in.scores), add_of(in));
    expect_sum(alibi->forward(in.scores), in);
  }
}

TEST_P(AlibiModule, LearnsItsSlopes) {
  AlibiInputs in = inputs();
  ALiBiBias alibi(ALiBiBiasOptions(kHeads).learnable(true));
  alibi->to(device());
  in = with_alibi_grad(in, true, false);
  const at::Tensor grad = random_tensor(in.scores.sizes(), GetParam());
  alibi->forward(in.scores).backward(grad);
  ASSERT_TRUE(alibi->slopes.grad().defined());
  EXPECT_EQ(alibi->slopes.grad().scalar_type(), at::kFloat);
  expect_slope_gradient(alibi->slopes.grad(), scalar_add_gradients(in, grad), 1e-6);
  expect_same_bits(in.scores.grad(), grad);
}

TEST_P(AlibiModule, FixedSlopesTakeNoGradient) {
  AlibiInputs in = with_alibi_grad(inputs(), true, false);
  ALiBiBias alibi{ALiBiBiasOptions(kHeads)};
  EXPECT_TRUE(alibi->parameters().empty());
  EXPECT_TRUE(alibi->buffers().empty());
  EXPECT_FALSE(alibi->bias(3, 3, dtype(), device()).requires_grad());
  alibi->softmax(in.scores).sum().backward();
  EXPECT_TRUE(in.scores.grad().defined());
}

TEST_P(AlibiModule, ShardsAreSlicesOfTheWhole) {
  // The slopes of 6 heads are not the slopes of 3 heads twice.
  AlibiCase c;
  c.heads = 6;
  AlibiInputs in = make_alibi_inputs(c, GetParam());
  for (const bool custom : {false, true}) {
    for (const bool learnable : {false, true}) {
      ALiBiBiasOptions options(6);
      options.learnable(learnable).causal(true);
      if (custom) {
        options.slopes(at::rand({6}));
      }
      ALiBiBias whole(options);
      whole->to(device());
      for (const int64_t offset : {0, 2, 3, 5}) {
        ALiBiBiasOptions shard_options = options;
        shard_options.num_heads(offset == 5 ? 1 : 2).head_offset(offset).total_heads(6);
        ALiBiBias shard(shard_options);
        shard->to(device());
        const auto slice = [&](const at::Tensor& y, int64_t dim) {
          return y.narrow(dim, offset, shard_options.num_heads());
        };
        expect_same_bits(shard->slopes_on(device()), slice(whole->slopes_on(device()), 0));
        expect_same_bits(shard->forward(slice(in.scores, 1)), slice(whole->forward(in.scores), 1));
        expect_same_bits(shard->softmax(slice(in.scores, 1)), slice(whole->softmax(in.scores), 1));
        expect_same_bits(shard->bias(3, 4, dtype(), device()), slice(whole->bias(3, 4, dtype(), device()), 0));
      }
    }
  }
}

TEST_P(AlibiModule, CustomSlopesAreUsed) {
  AlibiInputs in = inputs();
  for (const at::ScalarType given : {at::kFloat, at::kDouble, at::kHalf}) {
    const at::Tensor slopes = at::tensor({0.5, 0.125, 2.0}, at::kDouble).to(given);
    in.slopes = slopes.to(device(), at::kFloat);
    for (const bool learnable : {false, true}) {
      ALiBiBias alibi(ALiBiBiasOptions(kHeads).slopes(slopes).learnable(learnable));
      alibi->to(device());
      expect_same_bits(alibi->forward(in.scores), add_of(in));
    }
  }
}

TEST_P(AlibiModule, WrongScoresAreAnError) {
  ALiBiBias alibi{ALiBiBiasOptions(4)};
  const at::Tensor scores = inputs().scores;
  expect_error([&] { alibi->forward(scores); }, {"[H] = [3]", "[4]"});
  expect_error([&] { alibi->softmax(scores); }, {"[H] = [3]", "[4]"});
  expect_error([&] { alibi->forward(at::Tensor()); }, {"undefined"});
}

TEST_P(AlibiModule, CausalAttentionInAModuleThatIsNotIsAnError) {
  ALiBiBias alibi{ALiBiBiasOptions(kHeads)};
  const at::Tensor x = random_tensor({1, 2, kHeads, 8}, GetParam());
  const auto causal = posenc::ALiBiAttentionOptions().causal(true);
  expect_error([&] { alibi->attention(x, x, x, causal); }, {"posenc::ALiBiBias", "without causal", "got causal"});
}

TEST_P(AlibiModule, EmptyScoresWork) {
  ALiBiBias alibi{ALiBiBiasOptions(kHeads)};
  const at::Tensor scores = inputs().scores.narrow(-1, 0, 0);
  EXPECT_EQ(alibi->forward(scores).sizes(), scores.sizes());
  EXPECT_EQ(alibi->softmax(scores).sizes(), scores.sizes());
}

// ---------------------------------------------------------------------------------------------------------------------
// As a submodule

TEST(AlibiSubmodule, CustomSlopesAreCopied) {
  const at::Tensor slopes = at::rand({4});
  for (const bool learnable : {false, true}) {
    ALiBiBias alibi(ALiBiBiasOptions(4).slopes(slopes).learnable(learnable));
    const at::Tensor expected = alibi->slopes_on(at::kCPU).detach().clone();
    slopes.add_(1);
    expect_same_bits(alibi->slopes_on(at::kCPU), expected);
  }
}

TEST(AlibiSubmodule, LearnableSlopesAreItsOnlyParameter) {
  ALiBiBias alibi(ALiBiBiasOptions(4).learnable(true));
  const auto parameters = alibi->named_parameters();
  ASSERT_EQ(parameters.size(), 1U);
  EXPECT_EQ(parameters[0].key(), "slopes");
  EXPECT_TRUE(parameters[0].value().requires_grad());
  EXPECT_TRUE(alibi->slopes.is_leaf());
  EXPECT_TRUE(alibi->buffers().empty());
}

TEST(AlibiSubmodule, LearnableSlopesStayFloat32) {
  ALiBiBias alibi(ALiBiBiasOptions(12).learnable(true));
  const at::Tensor expected = alibi->slopes.detach().clone();
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kDouble}) {
    alibi->to(dtype);
    expect_same_bits(alibi->slopes, expected);
    alibi->to(at::kCPU, dtype);
    expect_same_bits(alibi->slopes, expected);
    EXPECT_TRUE(alibi->slopes.requires_grad());
  }
}

/// A model that keeps the bias as a submodule.
class AttentionImpl : public torch::nn::Cloneable<AttentionImpl> {
 public:
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as LibTorch's own modules do
  explicit AttentionImpl(bool learnable) : learnable_(learnable) { reset(); }
  void reset() override {
    alibi = register_module("alibi", ALiBiBias(ALiBiBiasOptions(12).learnable(learnable_)));
    weight = register_parameter("weight", at::ones({3}));
  }
  ALiBiBias alibi{nullptr};
  at::Tensor weight;

 private:
  bool learnable_;
};

TEST(AlibiSubmodule, IsConvertedWithItsParent) {
  const at::Tensor scores = at::randn({1, 12, 4, 2048});
  for (const bool learnable : {false, true}) {
    AttentionImpl model(learnable);
    const at::Tensor expected = model.alibi->forward(scores).detach();
    model.to(at::kBFloat16);
    EXPECT_EQ(model.weight.scalar_type(), at::kBFloat16);
    expect_same_bits(model.alibi->slopes_on(at::kCPU), posenc::alibi_slopes(12));
    expect_same_bits(model.alibi->forward(scores), expected);
  }
}

TEST(AlibiSubmodule, IsClonedWithItsParent) {
  const at::Tensor scores = at::randn({1, 12, 4, 9});
  for (const bool learnable : {false, true}) {
    const auto model = std::make_shared<AttentionImpl>(learnable);
    if (learnable) {
      const at::NoGradGuard no_grad;
      model->alibi->slopes.mul_(3);
    }
    const at::Tensor expected = model->alibi->forward(scores).detach();
    const auto copy = std::dynamic_pointer_cast<AttentionImpl>(model->clone());
    ASSERT_TRUE(copy);
    expect_same_bits(copy->alibi->forward(scores), expected);
    EXPECT_EQ(copy->parameters().size(), model->parameters().size());
    if (learnable) {
      // The copy has its own parameter.
      const at::NoGradGuard no_grad;
      copy->alibi->slopes.zero_();
      expect_same_bits(copy->alibi->forward(scores), scores);
    }
    expect_same_bits(model->alibi->forward(scores), expected);
  }
}

TEST(AlibiSubmodule, IsSavedAndLoaded) {
  const at::Tensor scores = at::randn({1, 12, 4, 9});
  for (const bool learnable : {false, true}) {
    ALiBiBias alibi(ALiBiBiasOptions(12).learnable(learnable));
    if (learnable) {
      const at::NoGradGuard no_grad;
      alibi->slopes.mul_(3);
    }
    std::stringstream stream;
    torch::save(alibi, stream);
    ALiBiBias loaded(ALiBiBiasOptions(12).learnable(learnable));
    loaded->to(at::kBFloat16);
    torch::load(loaded, stream);
    expect_same_bits(loaded->slopes_on(at::kCPU), alibi->slopes_on(at::kCPU));
    expect_same_bits(loaded->forward(scores), alibi->forward(scores));
  }
}

TEST(AlibiSubmodule, FollowsChangedOptionsAfterReset) {
  ALiBiBias alibi{ALiBiBiasOptions(4)};
  alibi->options.num_heads(6).max_bias(4);
  alibi->reset();
  expect_same_bits(alibi->slopes_on(at::kCPU), posenc::alibi_slopes(6, 4));
  alibi->options.num_heads(-1);
  expect_error([&] { alibi->reset(); }, {"num_heads", "-1"});
}

TEST(AlibiSubmodule, TakesNewSlopesForAsManyHeadsAfterReset) {
  ALiBiBias alibi{ALiBiBiasOptions(4)};
  alibi->options.max_bias(4);
  alibi->reset();
  expect_same_bits(alibi->slopes_on(at::kCPU), posenc::alibi_slopes(4, 4));
  const at::Tensor custom = at::rand({4});
  alibi->options.slopes(custom);
  alibi->reset();
  expect_same_bits(alibi->slopes_on(at::kCPU), custom);
}

TEST(AlibiSubmodule, BecomesLearnableAndFixedByReset) {
  ALiBiBias alibi{ALiBiBiasOptions(4)};
  alibi->options.learnable(true);
  alibi->reset();
  EXPECT_EQ(alibi->parameters().size(), 1U);
  alibi->reset();
  EXPECT_EQ(alibi->parameters().size(), 1U);
}

TEST(AlibiSubmodule, WorksInAnyModule) {
  torch::nn::AnyModule any(ALiBiBias(ALiBiBiasOptions(3)));
  const at::Tensor scores = at::randn({1, 3, 4, 4});
  ALiBiBias alibi{ALiBiBiasOptions(3)};
  expect_same_bits(any.forward<at::Tensor>(scores), alibi->forward(scores));
}

TEST(AlibiThreads, SeveralMayUseOneModule) {
  ALiBiBias alibi{ALiBiBiasOptions(3)};
  const at::Tensor scores = at::randn({1, 3, 40, 40});
  const at::Tensor expected = scores + scalar_bias(posenc::alibi_slopes(3), 40, 40).to(at::kFloat);
  std::vector<at::Tensor> results(4);
  std::vector<std::thread> threads;
  threads.reserve(results.size());
  for (at::Tensor& result : results) {
    threads.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        result = alibi->forward(scores);
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (const at::Tensor& result : results) {
    expect_same_bits(result, results[0]);
    EXPECT_TRUE(at::allclose(result, expected));
  }
}

// slopes_on copies slopes to another device while clone compares them with its own. ThreadSanitizer reports data races.
TEST(AlibiThreads, OneMayCloneWhileAnotherMovesSlopes) {
  const at::Tensor expected = posenc::alibi_slopes(3);
  for (int round = 0; round < 20; ++round) {
    ALiBiBias alibi{ALiBiBiasOptions(3)};
    std::shared_ptr<torch::nn::Module> copy;
    std::thread cloning([&] { copy = alibi->clone(); });
    std::thread moving([&] { EXPECT_TRUE(alibi->slopes_on(at::kMeta).is_meta()); });
    cloning.join();
    moving.join();
    const auto clone = std::dynamic_pointer_cast<posenc::ALiBiBiasImpl>(copy);
    ASSERT_TRUE(clone);
    expect_same_bits(clone->slopes_on(at::kCPU), expected);
    expect_same_bits(alibi->slopes_on(at::kCPU), expected);
  }
}

TEST(AlibiSubmodule, PrintsItsOptions) {
  std::ostringstream stream;
  stream << *ALiBiBias(ALiBiBiasOptions(4).causal(true).max_bias(16).learnable(true).head_offset(2).total_heads(8));
  const std::string text = stream.str();
  for (const char* part :
       {"posenc::ALiBiBias(", "num_heads=4", "causal=true", "max_bias=16", "learnable=true", "head_offset=2",
        "total_heads=8"}) {
    EXPECT_NE(text.find(part), std::string::npos) << "'" << part << "' is not in: " << text;
  }
}

}  // namespace
}  // namespace posenc::test
