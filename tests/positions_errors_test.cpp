#include "positions_support.h"

#include <posenc/positions.h>

#include <ATen/ATen.h>

#include <limits>

// Errors of the functions of positions.
namespace posenc::test {
namespace {

using posenc::MropeOptions;

class PositionErrors : public DeviceTest {
 protected:
  at::Tensor tensor(const Ids& values) const { return at::tensor(values, at::kLong).to(device()); }
  at::Tensor floats() const { return at::zeros({2}, device()); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, PositionErrors, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, PositionErrors, ::testing::Values(at::kCUDA), device_name);

TEST_P(PositionErrors, BeginBehindTheLastInt32) {
  constexpr int64_t kLast = std::numeric_limits<int32_t>::max();
  const at::Tensor positions = posenc::offset_positions(kLast - 4, 4, device(), at::kInt);
  EXPECT_EQ(positions[3].item<int64_t>(), kLast - 1);
  expect_error([&] { posenc::offset_positions(kLast - 3, 4, device(), at::kInt); }, {"2^31", "2147483648"});
}

TEST_P(PositionErrors, OfOffsetsNameWhatIsWrong) {
  const std::string op = "posenc::offset_positions";
  expect_error([&] { posenc::offset_positions(0, -1, device()); }, {op, "seq_len", "not negative", "-1"});
  expect_error([&] { posenc::offset_positions(0, 1, device(), at::kFloat); }, {op, "int32 or int64", "Float"});
  expect_error([&] { posenc::offset_positions(1 << 30, 1 << 30, device(), at::kInt); }, {op, "2^31", "2147483648"});
  expect_error([&] { posenc::offset_positions(-(int64_t{1} << 32), 1, device(), at::kInt); }, {op, "-2^31", "-429496"});
  expect_error([&] { posenc::offset_positions(INT64_MAX, 1, device()); }, {op, "2^63", "9223372036854775807"});
  expect_error([&] { posenc::offset_positions(at::Tensor(), 1); }, {op, "offsets", "undefined"});
  expect_error([&] { posenc::offset_positions(floats(), 1); }, {op, "offsets", "int32 or int64", "Float"});
  expect_error([&] { posenc::offset_positions(tensor({1}).view({1, 1}), 1); }, {op, "offsets", "[B]", "[1, 1]"});
  expect_error([&] { posenc::offset_positions(tensor({1}), -2); }, {op, "seq_len", "-2"});
}

TEST_P(PositionErrors, OfPackedSequencesNameWhatIsWrong) {
  const std::string op = "posenc::packed_positions";
  const at::Tensor good = tensor({0, 2, 3});
  expect_error([&] { posenc::packed_positions(at::Tensor(), 3); }, {op, "cu_seqlens", "undefined"});
  expect_error([&] { posenc::packed_positions(floats(), 3); }, {op, "cu_seqlens", "int32 or int64", "Float"});
  expect_error([&] { posenc::packed_positions(tensor({}), 3); }, {op, "cu_seqlens", "[N + 1]", "[0]"});
  expect_error([&] { posenc::packed_positions(good.view({1, 3}), 3); }, {op, "cu_seqlens", "[N + 1]", "[1, 3]"});
  expect_error([&] { posenc::packed_positions(good, -1); }, {op, "num_tokens", "-1"});
  expect_error([&] { posenc::packed_positions(good.to(at::kInt), int64_t{1} << 31); }, {op, "num_tokens", "2^31"});
  expect_error([&] { posenc::packed_positions(good, 3, tensor({1})); }, {op, "offsets", "[N] = [2]", "[1]"});
  expect_error([&] { posenc::packed_positions(good, 3, floats()); }, {op, "offsets", "int32 or int64", "Float"});
  expect_error([&] { posenc::packed_positions(good, 3, tensor({1, 2}).to(at::kInt)); }, {op, "offsets", "Long", "Int"});
}

TEST_P(PositionErrors, OfShardsNameWhatIsWrong) {
  std::string op = "posenc::context_parallel_positions";
  expect_error([&] { posenc::context_parallel_positions(8, 0, 0, device()); }, {op, "world_size", "positive", "0"});
  for (const int64_t rank : {-1, 2}) {
    expect_error(
        [&] { posenc::context_parallel_positions(8, rank, 2, device()); }, {op, "rank", "1", std::to_string(rank)});
  }
  for (const int64_t seq_len : {6, -4}) {
    expect_error(
        [&] { posenc::context_parallel_positions(seq_len, 0, 2, device()); },
        {op, "seq_len", "2 world_size = 4", std::to_string(seq_len)});
  }
  expect_error([&] { posenc::context_parallel_positions(8, 0, 2, device(), at::kHalf); }, {op, "int32 or int64"});

  op = "posenc::context_parallel_packed_positions";
  const at::Tensor good = tensor({0, 4, 8});
  expect_error([&] { posenc::context_parallel_packed_positions(floats(), 8, 0, 2); }, {op, "cu_seqlens", "Float"});
  expect_error([&] { posenc::context_parallel_packed_positions(good, 8, 2, 2); }, {op, "rank", "2"});
  expect_error(
      [&] { posenc::context_parallel_packed_positions(good, 10, 0, 2); }, {op, "num_tokens", "2 world_size = 4", "10"});
}

TEST_P(PositionErrors, OfMropeNameWhatIsWrong) {
  const std::string op = "posenc::mrope_positions";
  const at::Tensor ids = tensor({kText, kImage}).view({1, 2});
  const at::Tensor grid = tensor({1, 2, 2}).view({1, 3});
  const auto call = [](const at::Tensor& input_ids, const MropeOptions& options = MropeOptions(),
                       const std::optional<at::Tensor>& images = std::nullopt,
                       const std::optional<at::Tensor>& videos = std::nullopt,
                       const std::optional<at::Tensor>& seconds = std::nullopt,
                       const std::optional<at::Tensor>& mask = std::nullopt) {
    return [=] { posenc::mrope_positions(input_ids, options, images, videos, seconds, mask); };
  };
  const MropeOptions defaults;
  expect_error(call(at::Tensor()), {op, "input_ids", "undefined"});
  expect_error(call(ids.to(at::kFloat)), {op, "input_ids", "int32 or int64", "Float"});
  expect_error(call(ids.flatten()), {op, "input_ids", "[B, S]", "[2]"});
  expect_error(call(ids, MropeOptions().spatial_merge_size(0)), {op, "spatial_merge_size", "0"});
  expect_error(call(ids, MropeOptions().video_token_id(kImage)), {op, "video_token_id", "differ", "151655"});
  expect_error(call(ids, MropeOptions().tokens_per_second(-1)), {op, "tokens_per_second", "-1"});
  expect_error(call(ids, MropeOptions().tokens_per_second(2).separate_frames(true)), {op, "separate_frames", "2"});
  expect_error(call(ids, defaults, at::Tensor()), {op, "image_grid_thw", "undefined"});
  expect_error(call(ids, defaults, grid.flatten()), {op, "image_grid_thw", "[N, 3]", "[3]"});
  expect_error(call(ids, defaults, {}, grid.to(at::kDouble)), {op, "video_grid_thw", "int32 or int64", "Double"});
  expect_error(call(ids, defaults, {}, grid, at::ones({1}, device())), {op, "tokens_per_second", "seconds_per_grid"});
  const auto timed = MropeOptions().tokens_per_second(2);
  expect_error(call(ids, timed, grid, {}, at::ones({1}, device())), {op, "video_grid_thw", "seconds_per_grid"});
  expect_error(call(ids, timed, {}, grid, at::ones({2}, device())), {op, "seconds_per_grid", "[N] = [1]", "[2]"});
  expect_error(call(ids, timed, {}, grid, tensor({1})), {op, "seconds_per_grid", "floating", "Long"});
  expect_error(call(ids, defaults, {}, {}, {}, tensor({1, 1})), {op, "attention_mask", "[1, 2]", "[2]"});
  expect_error(call(ids, defaults, {}, {}, {}, ids.to(at::kFloat)), {op, "attention_mask", "bool", "Float"});
}

TEST_P(PositionErrors, OfGridsNameWhatIsWrong) {
  std::string op = "posenc::grid_positions";
  expect_error([&] { posenc::grid_positions(floats(), 3); }, {op, "grids", "int32 or int64", "Float"});
  expect_error([&] { posenc::grid_positions(tensor({1, 2}), 3); }, {op, "grids", "[N, 3] or [N, 2]", "[2]"});
  expect_error([&] { posenc::grid_positions(tensor({1, 2}).view({1, 2}), -3); }, {op, "num_tokens", "-3"});
  expect_error([&] { posenc::grid_positions(tensor({1, 2}).view({1, 2}), 3, 0); }, {op, "spatial_merge_size", "0"});
  op = "posenc::llama4_vision_positions";
  expect_error([&] { posenc::llama4_vision_positions(-1, 2, 1, device()); }, {op, "height", "-1"});
  expect_error([&] { posenc::llama4_vision_positions(1, -2, 1, device()); }, {op, "width", "-2"});
  expect_error([&] { posenc::llama4_vision_positions(1, 2, -3, device()); }, {op, "num_images", "-3"});
  expect_error([&] { posenc::llama4_vision_positions(1, 2, 1, device(), at::kFloat); }, {op, "int32 or int64"});
}

/// Arguments on different devices.
class PositionMixedDevices : public PositionErrors {};

INSTANTIATE_TEST_SUITE_P(Cuda, PositionMixedDevices, ::testing::Values(at::kCUDA), device_name);

TEST_P(PositionMixedDevices, AreAnError) {
  const at::Tensor ids = tensor({kText, kImage}).view({1, 2});
  const at::Tensor grid = tensor({1, 2, 2}).view({1, 3});
  expect_error([&] { posenc::packed_positions(tensor({0, 1}), 1, tensor({3}).cpu()); }, {"offsets", "cuda", "cpu"});
  expect_error([&] { posenc::mrope_positions(ids, MropeOptions(), grid.cpu()); }, {"image_grid_thw", "cuda", "cpu"});
  expect_error(
      [&] { posenc::mrope_positions(ids, MropeOptions(), {}, grid.cpu()); }, {"video_grid_thw", "cuda", "cpu"});
  expect_error(
      [&] { posenc::mrope_positions(ids, MropeOptions().tokens_per_second(2), {}, grid, at::ones({1})); },
      {"seconds_per_grid", "cuda", "cpu"});
  expect_error(
      [&] { posenc::mrope_positions(ids, MropeOptions(), {}, {}, {}, ids.cpu()); }, {"attention_mask", "cuda", "cpu"});
}

}  // namespace
}  // namespace posenc::test
