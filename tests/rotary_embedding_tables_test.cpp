#include "rotary_embedding_module_support.h"

#include <posenc/logging.h>
#include <posenc/modules/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/InferenceMode.h>
#include <torch/serialize.h>

#include <limits>
#include <sstream>
#include <thread>

namespace posenc::test {
namespace {

using posenc::Layout;
using posenc::RotaryEmbedding;
using posenc::RotaryEmbeddingOptions;

constexpr int64_t kHeadDim = 16;

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

}  // namespace
}  // namespace posenc::test
