#include "alibi_support.h"

#include <ATen/ATen.h>

#include <limits>

namespace posenc::test {
namespace {

/// A valid call with scores `[2, 3, 5, 7]`.
AlibiInputs valid_inputs(at::Device device) {
  AlibiCase c;
  c.masked = true;
  return make_alibi_inputs(c, {device.type(), at::kFloat});
}

/// `spoil` makes a valid call invalid. `of_add` and `of_softmax` are required parts of the messages of these operators,
/// empty for operators for which the call remains valid.
struct BadCall {
  std::string name;
  std::function<void(AlibiInputs&, at::Device)> spoil;
  std::vector<std::string> of_add;
  std::vector<std::string> of_softmax;
};

std::ostream& operator<<(std::ostream& stream, const BadCall& call) {
  return stream << call.name;
}

std::vector<BadCall> bad_calls() {
  using Sizes = std::vector<int64_t>;
  using Spoil = std::function<void(AlibiInputs&, at::Device)>;
  std::vector<BadCall> calls;
  const auto add = [&calls](const std::string& name, const std::vector<std::string>& parts, const Spoil& spoil) {
    calls.push_back({name, spoil, parts, parts});
  };
  const auto add_softmax = [&calls](
                               const std::string& name, const std::vector<std::string>& parts, const Spoil& spoil) {
    calls.push_back({name, spoil, {}, parts});
  };

  // Scores.
  for (const Sizes& sizes : {Sizes{}, Sizes{7}, Sizes{5, 7}, Sizes{1, 2, 3, 5, 7}}) {
    add("ScoresOf" + std::to_string(sizes.size()) + "Dimensions",
        {"expected scores", "[B, H, Sq, Sk] or [H, Sq, Sk]", "got " + c10::str(at::IntArrayRef(sizes))},
        [sizes](AlibiInputs& in, at::Device) { in.scores = at::zeros(sizes, in.scores.options()); });
  }
  for (const at::ScalarType dtype : {at::kInt, at::kBool, at::kComplexFloat, at::kFloat8_e4m3fn}) {
    add(std::string("ScoresOf") + at::toString(dtype),
        {"expected scores", "float16, bfloat16, float32 or float64", std::string("got ") + at::toString(dtype)},
        [dtype](AlibiInputs& in, at::Device) { in.scores = at::zeros_like(in.scores).to(dtype); });
  }
  add("UndefinedScores", {"expected scores", "undefined"},
      [](AlibiInputs& in, at::Device) { in.scores = at::Tensor(); });

  add("NothingDefined", {"expected scores", "undefined"},
      [](AlibiInputs& in, at::Device) { in = {at::Tensor(), at::Tensor()}; });

  // Slopes.
  add("UndefinedSlopes", {"expected slopes", "undefined"},
      [](AlibiInputs& in, at::Device) { in.slopes = at::Tensor(); });
  for (const Sizes& sizes : {Sizes{2}, Sizes{4}, Sizes{1}, Sizes{}, Sizes{3, 1}, Sizes{1, 3, 1, 1}}) {
    std::string name = "SlopesOfSizes";
    for (const int64_t size : sizes) {
      name += std::to_string(size);
    }
    add(name, {"expected slopes", "[H] = [3]", "got " + c10::str(at::IntArrayRef(sizes))},
        [sizes](AlibiInputs& in, at::Device) { in.slopes = at::zeros(sizes, in.slopes.options()); });
  }
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kDouble, at::kLong}) {
    add(std::string("SlopesOf") + at::toString(dtype),
        {"expected slopes", "float32", std::string("got ") + at::toString(dtype)},
        [dtype](AlibiInputs& in, at::Device) { in.slopes = in.slopes.to(dtype); });
  }
  add("DoubleSlopesForBFloat16", {"expected slopes", "float32", "BFloat16", "got Double"},
      [](AlibiInputs& in, at::Device) {
        in.scores = in.scores.to(at::kBFloat16);
        in.slopes = in.slopes.to(at::kDouble);
      });
  add("BFloat16SlopesForBFloat16", {"expected slopes", "float32", "got BFloat16"}, [](AlibiInputs& in, at::Device) {
    in.scores = in.scores.to(at::kBFloat16);
    in.slopes = in.slopes.to(at::kBFloat16);
  });
  // Meta is a second device that is always available.
  add("SlopesOnAnotherDevice", {"expected slopes", "device of scores", "got meta"},
      [](AlibiInputs& in, at::Device) { in.slopes = in.slopes.to(at::kMeta); });

  // query_offset.
  for (const int64_t offset :
       {int64_t{1} << 31, -(int64_t{1} << 31), std::numeric_limits<int64_t>::max(),
        std::numeric_limits<int64_t>::min()}) {
    add(std::string("Offset") + (offset < 0 ? "Minus" : "") + std::to_string(calls.size()),
        {"expected a query_offset", "2^31", "got " + std::to_string(offset)},
        [offset](AlibiInputs& in, at::Device) { in.query_offset = offset; });
  }

  // key_padding_mask.
  add_softmax("UndefinedMask", {"expected key_padding_mask", "undefined"}, [](AlibiInputs& in, at::Device) {
    in.key_padding_mask = at::Tensor();
  });
  for (const Sizes& sizes : {Sizes{7}, Sizes{1, 7}, Sizes{2, 6}, Sizes{7, 2}, Sizes{2, 1, 1, 7}, Sizes{3, 7}}) {
    std::string name = "MaskOfSizes";
    for (const int64_t size : sizes) {
      name += std::to_string(size);
    }
    add_softmax(
        name, {"expected key_padding_mask", "[B, Sk] = [2, 7]", "got " + c10::str(at::IntArrayRef(sizes))},
        [sizes](AlibiInputs& in, at::Device) {
          in.key_padding_mask = at::zeros(sizes, in.key_padding_mask->options());
        });
  }
  add_softmax(
      "MaskOfTwoBatchesForThreeDimensions", {"expected key_padding_mask", "[B, Sk] = [1, 7]", "got [2, 7]"},
      [](AlibiInputs& in, at::Device) { in.scores = in.scores[0]; });
  for (const at::ScalarType dtype : {at::kByte, at::kFloat, at::kLong}) {
    add_softmax(
        std::string("MaskOf") + at::toString(dtype),
        {"expected key_padding_mask", "bool", std::string("got ") + at::toString(dtype)},
        [dtype](AlibiInputs& in, at::Device) { in.key_padding_mask = in.key_padding_mask->to(dtype); });
  }
  add_softmax(
      "MaskOnAnotherDevice", {"expected key_padding_mask", "device of scores", "got meta"},
      [](AlibiInputs& in, at::Device) { in.key_padding_mask = in.key_padding_mask->to(at::kMeta); });
  return calls;
}

class AlibiErrors : public ::testing::TestWithParam<std::tuple<at::DeviceType, BadCall>> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam())); }

  at::Device device() const { return at::Device(std::get<0>(GetParam())); }
  const BadCall& bad_call() const { return std::get<1>(GetParam()); }

  AlibiInputs spoiled() const {
    AlibiInputs in = valid_inputs(device());
    bad_call().spoil(in, device());
    return in;
  }

  void expect_rejected(
      const char* name,
      const std::vector<std::string>& expected,
      const std::function<void(AlibiInputs&)>& call) const {
    AlibiInputs in = spoiled();
    if (expected.empty()) {
      EXPECT_NO_THROW(call(in));
      return;
    }
    std::vector<std::string> parts = expected;
    parts.push_back(std::string(name) + ": ");
    expect_error([&] { call(in); }, parts);
    // The device must still be usable.
    const AlibiInputs valid = valid_inputs(device());
    expect_sum(add_of(valid), valid);
  }
};

TEST_P(AlibiErrors, OfTheSumNameWhatIsWrong) {
  expect_rejected("posenc::alibi_add", bad_call().of_add, [](AlibiInputs& in) { add_of(in); });
}

TEST_P(AlibiErrors, OfTheSumInPlaceNameWhatIsWrong) {
  expect_rejected("posenc::alibi_add_", bad_call().of_add, [](AlibiInputs& in) {
    posenc::alibi_add_(in.scores, in.slopes, in.causal, in.query_offset);
  });
}

TEST_P(AlibiErrors, OfTheSoftmaxNameWhatIsWrong) {
  expect_rejected("posenc::alibi_softmax", bad_call().of_softmax, [](AlibiInputs& in) { softmax_of(in); });
}

TEST_P(AlibiErrors, AreTheSameWhereAGradientIsRecorded) {
  AlibiInputs in = spoiled();
  if (in.slopes.defined() && in.slopes.is_floating_point()) {
    in.slopes = in.slopes.detach().requires_grad_();
  }
  if (in.scores.defined() && in.scores.is_floating_point()) {
    in.scores = in.scores.detach().requires_grad_();
  }
  expect_error([&] { softmax_of(in); }, bad_call().of_softmax);
  if (!bad_call().of_add.empty()) {
    expect_error([&] { add_of(in); }, bad_call().of_add);
  }
}

std::string error_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, BadCall>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiErrors,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(bad_calls())),
    error_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiErrors,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(bad_calls())),
    error_name);

// ---------------------------------------------------------------------------------------------------------------------
// alibi_bias

class AlibiBiasErrors : public DeviceTest {
 protected:
  at::Tensor slopes(at::IntArrayRef sizes = {3}, at::ScalarType dtype = at::kFloat) const {
    return at::zeros(sizes, at::TensorOptions(dtype).device(device()));
  }
  static void expect_rejected(const std::function<void()>& call, std::vector<std::string> parts) {
    parts.emplace_back("posenc::alibi_bias: ");
    expect_error(call, parts);
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiBiasErrors, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiBiasErrors, ::testing::Values(at::kCUDA), device_name);

TEST_P(AlibiBiasErrors, OfNegativeLengths) {
  expect_rejected([&] { posenc::alibi_bias(slopes(), -1, 4); }, {"q_len and k_len", "got -1 and 4"});
  expect_rejected([&] { posenc::alibi_bias(slopes(), 3, -4); }, {"q_len and k_len", "got 3 and -4"});
}

TEST_P(AlibiBiasErrors, OfLengthsBeyondInt32) {
  const int64_t many = int64_t{1} << 31;
  expect_rejected([&] { posenc::alibi_bias(slopes(), many, 1); }, {"queries and keys", std::to_string(many)});
  expect_rejected([&] { posenc::alibi_bias(slopes(), 1, many); }, {"queries and keys", std::to_string(many)});
}

TEST_P(AlibiBiasErrors, OfBadSlopes) {
  expect_rejected([&] { posenc::alibi_bias(slopes({3, 1}), 2, 2); }, {"slopes of shape [H]", "got [3, 1]"});
  expect_rejected([&] { posenc::alibi_bias(slopes({}), 2, 2); }, {"slopes of shape [H]", "got []"});
  expect_rejected([&] { posenc::alibi_bias(at::Tensor(), 2, 2); }, {"slopes", "undefined"});
  expect_rejected([&] { posenc::alibi_bias(slopes({3}, at::kHalf), 2, 2); }, {"slopes of dtype float32", "got Half"});
  expect_rejected([&] { posenc::alibi_bias(slopes({3}, at::kDouble), 2, 2); }, {"slopes of dtype float32", "Double"});
  EXPECT_NO_THROW(posenc::alibi_bias(slopes({3}, at::kDouble), 2, 2, /*causal=*/false, at::kDouble));
}

TEST_P(AlibiBiasErrors, OfDtypesThatCannotHoldIt) {
  for (const at::ScalarType dtype : {at::kInt, at::kBool, at::kComplexFloat, at::kFloat8_e5m2}) {
    expect_rejected(
        [&] { posenc::alibi_bias(slopes(), 2, 2, /*causal=*/false, dtype); },
        {"expected dtype float16, bfloat16, float32 or float64", std::string("got ") + at::toString(dtype)});
  }
}

TEST_P(AlibiBiasErrors, OfOffsetsBeyondInt32) {
  for (const int64_t offset :
       {int64_t{1} << 31, -(int64_t{1} << 31), std::numeric_limits<int64_t>::max(),
        std::numeric_limits<int64_t>::min()}) {
    expect_rejected(
        [&] { posenc::alibi_bias(slopes(), 2, 2, /*causal=*/false, at::kFloat, offset); },
        {"query_offset", "2^31", "got " + std::to_string(offset)});
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Arguments on a GPU and on the CPU

class AlibiMixedDevices : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cuda, AlibiMixedDevices, ::testing::Values(at::kCUDA), device_name);

TEST_P(AlibiMixedDevices, SlopesOnTheHostAreAnError) {
  AlibiInputs in = valid_inputs(device());
  in.slopes = in.slopes.cpu();
  expect_error([&] { add_of(in); }, {"expected slopes", "device of scores", "cuda", "got cpu"});
  expect_error([&] { softmax_of(in); }, {"expected slopes", "device of scores", "cuda", "got cpu"});
}

TEST_P(AlibiMixedDevices, ScoresOnTheHostAreAnError) {
  AlibiInputs in = valid_inputs(device());
  in.scores = in.scores.cpu();
  expect_error([&] { add_of(in); }, {"expected slopes", "device of scores", "cpu", "got cuda"});
  expect_error([&] { softmax_of(in); }, {"device of scores", "cpu", "got cuda"});
}

TEST_P(AlibiMixedDevices, MaskOnTheHostIsAnError) {
  AlibiInputs in = valid_inputs(device());
  in.key_padding_mask = in.key_padding_mask->cpu();
  expect_error([&] { softmax_of(in); }, {"expected key_padding_mask", "device of scores", "cuda", "got cpu"});
}

}  // namespace
}  // namespace posenc::test
