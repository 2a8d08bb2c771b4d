#include "support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

/// A valid call: q `[2, 3, 4, 8]`, k `[2, 3, 2, 8]`, cos and sin `[6, 4]`.
RotaryInputs valid_inputs(at::Device device) {
  RotaryCase c;
  c.tokens = 3;
  c.head_dim = 8;
  c.rotary_dim = 8;
  return make_inputs(c, {device.type(), at::kFloat});
}

at::Tensor positions(at::IntArrayRef sizes, at::ScalarType dtype, at::Device device) {
  return at::zeros(sizes, at::TensorOptions(dtype).device(device));
}

/// `spoil` makes a valid call invalid. `of_one` and `of_pair` are required parts of the messages of
/// `rotary_embedding(q, ...)`, which names it x, and of `rotary_embedding_qk(q, k, ...)`.
struct BadCall {
  std::string name;
  std::function<void(RotaryInputs&, at::Device)> spoil;
  std::vector<std::string> of_one;  // empty: rotary_embedding(q, ...) remains valid
  std::vector<std::string> of_pair;
};

std::ostream& operator<<(std::ostream& stream, const BadCall& call) {
  return stream << call.name;
}

std::vector<BadCall> bad_calls() {
  using Sizes = std::vector<int64_t>;
  std::vector<BadCall> calls;
  const auto add = [&calls](
                       const std::string& name, const std::vector<std::string>& parts,
                       const std::function<void(RotaryInputs&, at::Device)>& spoil) {
    calls.push_back({name, spoil, parts, parts});
  };
  const auto add_input = [&calls](
                             const std::string& name, const std::vector<std::string>& parts,
                             const std::function<void(RotaryInputs&, at::Device)>& spoil) {
    BadCall call{name, spoil, parts, parts};
    call.of_one.emplace_back("expected x");
    call.of_pair.emplace_back("expected q");
    calls.push_back(call);
  };
  const auto add_pair = [&calls](
                            const std::string& name, const std::vector<std::string>& parts,
                            const std::function<void(RotaryInputs&, at::Device)>& spoil) {
    calls.push_back({name, spoil, {}, parts});
  };
  const auto add_tables = [&add](const std::string& name, const Sizes& sizes, const std::vector<std::string>& parts) {
    add(name, parts, [sizes](RotaryInputs& in, at::Device) {
      in.cos = at::zeros(sizes, in.cos.options());
      in.sin = at::zeros(sizes, in.cos.options());
    });
  };
  const auto add_positions =
      [&add](const std::string& name, const Sizes& sizes, at::ScalarType dtype, const std::vector<std::string>& parts) {
        add(name, parts,
            [sizes, dtype](RotaryInputs& in, at::Device device) { in.positions = positions(sizes, dtype, device); });
      };

  // Shapes and dtypes of the inputs.
  for (const Sizes& sizes : {Sizes{8}, Sizes{3, 8}, Sizes{1, 2, 3, 4, 8}}) {
    add_input(
        "InputOf" + std::to_string(sizes.size()) + "Dimensions",
        {"[B, S, H, D] or [T, H, D]", c10::str(at::IntArrayRef(sizes))},
        [sizes](RotaryInputs& in, at::Device) { in.q = at::zeros(sizes, in.q.options()); });
  }
  for (const at::ScalarType dtype : {at::kInt, at::kBool, at::kComplexFloat, at::kFloat8_e4m3fn}) {
    add_input(
        std::string("InputOf") + at::toString(dtype), {"float16, bfloat16, float32 or float64", at::toString(dtype)},
        [dtype](RotaryInputs& in, at::Device) { in.q = at::zeros(in.q.sizes(), in.q.options()).to(dtype); });
  }
  add_input("UndefinedInput", {"undefined"}, [](RotaryInputs& in, at::Device) { in.q = at::Tensor(); });

  // q and k.
  add_pair("UndefinedKeys", {"expected k", "undefined"}, [](RotaryInputs& in, at::Device) { in.k = at::Tensor(); });
  add_pair("KeysOfAnotherDtype", {"expected k", "dtype of q", "Float", "Double"}, [](RotaryInputs& in, at::Device) {
    in.k = in.k.to(at::kDouble);
  });
  add_pair("KeysOfIntegers", {"expected k", "Long"}, [](RotaryInputs& in, at::Device) { in.k = in.k.to(at::kLong); });
  for (const Sizes& sizes : {Sizes{1, 3, 2, 8}, Sizes{2, 4, 2, 8}, Sizes{2, 3, 2, 6}, Sizes{3, 2, 8}}) {
    std::string name = "KeysOfSizes";
    for (const int64_t size : sizes) {
      name += std::to_string(size);
    }
    add_pair(
        name, {"expected k", "head dimension", "[2, 3, 4, 8]", c10::str(at::IntArrayRef(sizes))},
        [sizes](RotaryInputs& in, at::Device) { in.k = at::zeros(sizes, in.k.options()); });
  }

  // Tables.
  add("UndefinedCos", {"cos", "undefined"}, [](RotaryInputs& in, at::Device) { in.cos = at::Tensor(); });
  add("UndefinedSin", {"sin", "undefined"}, [](RotaryInputs& in, at::Device) { in.sin = at::Tensor(); });
  add("TablesOfDifferentShapes", {"cos and sin", "[6, 4]", "[7, 4]"},
      [](RotaryInputs& in, at::Device) { in.sin = at::zeros({7, 4}, in.sin.options()); });
  add("HalfTablesForHalfInputs", {"expected cos", "Float", "got Half"}, [](RotaryInputs& in, at::Device) {
    in.q = in.q.to(at::kHalf), in.k = in.k.to(at::kHalf);
    in.cos = in.cos.to(at::kHalf), in.sin = in.sin.to(at::kHalf);
  });
  add("FloatTablesForDoubleInputs", {"expected cos", "Double", "got Float"},
      [](RotaryInputs& in, at::Device) { in.q = in.q.to(at::kDouble), in.k = in.k.to(at::kDouble); });
  add("DoubleSinForFloatInputs", {"expected sin", "Float", "got Double"},
      [](RotaryInputs& in, at::Device) { in.sin = in.sin.to(at::kDouble); });
  add_tables("TablesOfOneDimension", {4}, {"cos and sin", "[P, R/2] or [B, S, R/2]", "got [4]"});
  add_tables("TablesOfFourDimensions", {2, 3, 1, 4}, {"cos and sin", "[P, R/2] or [B, S, R/2]", "got [2, 3, 1, 4]"});
  add_tables("TablesWiderThanTheHead", {6, 5}, {"rotary width", "cos", "8", "got 10"});
  add_tables("TablesWithoutColumns", {6, 0}, {"rotary width", "cos", "got 0"});
  add_tables("TablesShorterThanTheSequence", {2, 4}, {"cos and sin", "at least 3 rows", "got [2, 4]"});
  add_tables("TablesPerTokenOfAnotherBatch", {3, 3, 4}, {"cos and sin", "2 or 1", "got [3, 3, 4]"});
  add_tables("TablesPerTokenTooShort", {2, 2, 4}, {"cos and sin", "[B, S, R/2]", "got [2, 2, 4]"});
  add_tables("TablesPerTokenTooLong", {2, 4, 4}, {"cos and sin", "[B, S, R/2]", "got [2, 4, 4]"});
  add("TablesPerTokenOfPackedInputs", {"cos and sin", "[P, R/2]", "got [1, 3, 4]"}, [](RotaryInputs& in, at::Device) {
    in.q = in.q[0], in.k = in.k[0];
    in.cos = in.sin = at::zeros({1, 3, 4}, in.cos.options());
  });
  add("TablesPerTokenWithPositions", {"positions", "per token", "[2, 3, 4]"}, [](RotaryInputs& in, at::Device device) {
    in.cos = in.sin = at::zeros({2, 3, 4}, in.cos.options());
    in.positions = positions({3}, at::kLong, device);
  });

  // Positions.
  for (const at::ScalarType dtype : {at::kFloat, at::kBool, at::kByte, at::kShort}) {
    add_positions(
        std::string("PositionsOf") + at::toString(dtype), {3}, dtype,
        {"expected positions", "int32 or int64", std::string("got ") + at::toString(dtype)});
  }
  add_positions("PositionsTooFew", {2}, at::kLong, {"expected positions", "[S] = [3]", "got [2]"});
  add_positions("PositionsTooMany", {6}, at::kLong, {"expected positions", "[S] = [3]", "got [6]"});
  add_positions("PositionsOfAnotherBatch", {1, 3}, at::kInt, {"expected positions", "[B, S] = [2, 3]", "got [1, 3]"});
  add_positions("PositionsTransposed", {3, 2}, at::kInt, {"expected positions", "[B, S] = [2, 3]", "got [3, 2]"});
  add_positions(
      "PositionsOfAxesWithoutPairAxes", {1, 2, 3}, at::kInt,
      {"expected positions", "[B, S] = [2, 3]", "without pair_axes", "got [1, 2, 3]"});
  add_positions("PositionsOfNoDimension", {}, at::kLong, {"expected positions", "got []"});
  add("PositionsOfPackedInputsWithBatch", {"expected positions", "[T] = [3]", "got [1, 3]"},
      [](RotaryInputs& in, at::Device device) {
        in.q = in.q[0], in.k = in.k[0];
        in.positions = positions({1, 3}, at::kLong, device);
      });
  add("UndefinedPositions", {"positions", "undefined"},
      [](RotaryInputs& in, at::Device) { in.positions = at::Tensor(); });

  add("TablesWithoutRows", {"cos and sin", "at least one row", "got [0, 4]"}, [](RotaryInputs& in, at::Device device) {
    in.cos = in.sin = at::zeros({0, 4}, in.cos.options());
    in.positions = positions({3}, at::kLong, device);
  });

  // Axes of positions.
  const auto add_axes = [&add](
                            const std::string& name, const Sizes& sizes, const Sizes& pair_axes,
                            const std::vector<std::string>& parts) {
    add(name, parts, [sizes, pair_axes](RotaryInputs& in, at::Device device) {
      in.positions = positions(sizes, at::kLong, device);
      in.pair_axes = pair_axes;
    });
  };
  add_axes("AxesTooFewPairs", {2, 2, 3}, {0, 1, 0}, {"expected as many pair_axes as pairs, R/2 = 4", "got 3"});
  add_axes("AxesTooManyPairs", {2, 2, 3}, {0, 1, 0, 1, 0}, {"expected as many pair_axes as pairs, R/2 = 4", "got 5"});
  add_axes("AxesBeyondThePositions", {2, 2, 3}, {0, 1, 2, 0}, {"expected pair_axes of 0 to 1", "[2, 2, 3]", "got 2"});
  add_axes("AxesBelowZero", {2, 3}, {0, 1, -1, 0}, {"expected pair_axes of 0 to 1", "[2, 3]", "got -1"});
  add_axes("AxesOfPositionsWithoutAxes", {3}, {0, 0, 0, 0}, {"expected positions", "[A, S] = [A, 3]", "got [3]"});
  add_axes(
      "AxesOfAnotherBatch", {3, 1, 3}, {0, 1, 2, 0},
      {"expected positions", "[A, B, S] = [A, 2, 3]", "with pair_axes", "got [3, 1, 3]"});
  add_axes("AxesTooMany", {5, 2, 3}, {0, 1, 2, 0}, {"expected positions", "1 to 4 axes", "got [5, 2, 3]"});
  add_axes("AxesNone", {0, 2, 3}, {0, 0, 0, 0}, {"expected positions", "1 to 4 axes", "got [0, 2, 3]"});
  add("AxesOfPackedInputsWithBatch", {"expected positions", "[A, T] = [A, 3]", "got [2, 1, 3]"},
      [](RotaryInputs& in, at::Device device) {
        in.q = in.q[0], in.k = in.k[0];
        in.positions = positions({2, 1, 3}, at::kLong, device);
        in.pair_axes = {0, 1, 0, 1};
      });
  add("AxesOfPackedInputsWithoutPairAxes", {"expected positions", "[T] = [3]", "without pair_axes", "got [2, 3]"},
      [](RotaryInputs& in, at::Device device) {
        in.q = in.q[0], in.k = in.k[0];
        in.positions = positions({2, 3}, at::kLong, device);
      });
  add("AxesWithoutPositions", {"expected positions", "with pair_axes", "got none"},
      [](RotaryInputs& in, at::Device) { in.pair_axes = {0, 0, 0, 0}; });
  add("AxesWithTablesPerToken", {"expected no pair_axes", "per token", "[2, 3, 4]", "got 4"},
      [](RotaryInputs& in, at::Device) {
        in.cos = in.sin = at::zeros({2, 3, 4}, in.cos.options());
        in.pair_axes = {0, 0, 0, 0};
      });
  add("AxesOfTooManyPairs", {"at most 512 pairs with pair_axes", "got 513"}, [](RotaryInputs& in, at::Device device) {
    in.q = at::zeros({2, 3, 1, 1026}, in.q.options()), in.k = in.q;
    in.cos = in.sin = at::zeros({6, 513}, in.cos.options());
    in.positions = positions({1, 3}, at::kLong, device);
    in.pair_axes = std::vector<int64_t>(513, 0);
  });

  // Devices. Meta is a second device that is always available.
  add("CosOnAnotherDevice", {"expected cos", "device", "meta"},
      [](RotaryInputs& in, at::Device) { in.cos = in.cos.to(at::kMeta); });
  add("SinOnAnotherDevice", {"expected sin", "device", "meta"},
      [](RotaryInputs& in, at::Device) { in.sin = in.sin.to(at::kMeta); });
  add("PositionsOnAnotherDevice", {"expected positions", "device", "meta"},
      [](RotaryInputs& in, at::Device device) { in.positions = positions({3}, at::kLong, device).to(at::kMeta); });
  add_pair("KeysOnAnotherDevice", {"expected k", "device of q", "meta"}, [](RotaryInputs& in, at::Device) {
    in.k = in.k.to(at::kMeta);
  });
  return calls;
}

class RotaryEmbeddingErrors : public ::testing::TestWithParam<std::tuple<at::DeviceType, BadCall>> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam())); }

  at::Device device() const { return at::Device(std::get<0>(GetParam())); }
  const BadCall& bad_call() const { return std::get<1>(GetParam()); }

  RotaryInputs spoiled() const {
    RotaryInputs in = valid_inputs(device());
    bad_call().spoil(in, device());
    return in;
  }

  void expect_still_usable() const {
    const RotaryInputs in = valid_inputs(device());
    expect_close_to_rounding(rotate(in, in.q), in, in.q);
  }
};

TEST_P(RotaryEmbeddingErrors, OfOneTensorNamesWhatIsWrong) {
  std::vector<std::string> parts = bad_call().of_one;
  const RotaryInputs in = spoiled();
  if (parts.empty()) {
    EXPECT_NO_THROW(rotate(in, in.q));
    return;
  }
  parts.emplace_back("posenc::rotary_embedding: ");
  expect_error([&] { rotate(in, in.q); }, parts);
  expect_still_usable();
}

TEST_P(RotaryEmbeddingErrors, OfAPairNamesWhatIsWrong) {
  std::vector<std::string> parts = bad_call().of_pair;
  parts.emplace_back("posenc::rotary_embedding_qk: ");
  const RotaryInputs in = spoiled();
  expect_error([&] { rotate_qk(in); }, parts);
  expect_still_usable();
}

TEST_P(RotaryEmbeddingErrors, AreTheSameWhereAGradientIsRecorded) {
  RotaryInputs in = spoiled();
  if (in.k.defined() && in.k.is_floating_point()) {
    in.k = in.k.detach().requires_grad_();
  }
  expect_error([&] { rotate_qk(in); }, bad_call().of_pair);
}

std::string error_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, BadCall>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    RotaryEmbeddingErrors,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(bad_calls())),
    error_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    RotaryEmbeddingErrors,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(bad_calls())),
    error_name);

// ---------------------------------------------------------------------------------------------------------------------
// Arguments on a GPU and on the CPU

class RotaryEmbeddingMixedDevices : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingMixedDevices, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryEmbeddingMixedDevices, TablesOnTheHostAreAnError) {
  RotaryInputs in = valid_inputs(device());
  in.cos = in.cos.cpu();
  in.sin = in.sin.cpu();
  expect_error([&] { rotate(in, in.q); }, {"expected cos", "device of x", "cuda", "got cpu"});
  expect_error([&] { rotate_qk(in); }, {"expected cos", "device of q", "cuda", "got cpu"});
}

TEST_P(RotaryEmbeddingMixedDevices, PositionsOnTheHostAreAnError) {
  RotaryInputs in = valid_inputs(device());
  in.positions = positions({3}, at::kLong, at::kCPU);
  expect_error([&] { rotate(in, in.q); }, {"expected positions", "device of x", "cuda", "got cpu"});
}

TEST_P(RotaryEmbeddingMixedDevices, InputsOnTheHostAreAnError) {
  RotaryInputs in = valid_inputs(device());
  in.q = in.q.cpu();
  expect_error([&] { rotate(in, in.q); }, {"expected cos", "device of x", "cpu", "got cuda"});
  expect_error([&] { rotate_qk(in); }, {"expected k", "device of q", "cpu", "got cuda"});
}

}  // namespace
}  // namespace posenc::test
