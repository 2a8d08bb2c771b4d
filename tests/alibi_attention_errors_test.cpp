#include "alibi_attention_support.h"

#include <posenc/alibi_attention.h>

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

// Attention: errors, and lengths that do not fit.
namespace posenc::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct BadCall {
  std::string name;
  std::vector<std::string> parts;
  std::function<void(AttentionInputs&)> spoil;
  bool packed = false;
};

std::ostream& operator<<(std::ostream& stream, const BadCall& call) {
  return stream << call.name;
}

/// Invalid calls: q `[2, 5, 4, 8]` and k `[2, 7, 2, 8]`, or packed q `[12, 4, 8]`, with one argument changed.
std::vector<BadCall> bad_calls() {
  std::vector<BadCall> calls;
  const auto add = [&calls](
                       const std::string& name, const std::vector<std::string>& parts,
                       const std::function<void(AttentionInputs&)>& spoil) {
    calls.push_back({name, parts, spoil, /*packed=*/false});
  };
  const auto add_packed = [&calls](
                              const std::string& name, const std::vector<std::string>& parts,
                              const std::function<void(AttentionInputs&)>& spoil) {
    calls.push_back({name, parts, spoil, /*packed=*/true});
  };
  const auto lengths = [](const AttentionInputs& in, const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).to(in.q.device());
  };
  add("QOfTwoDimensions", {"expected q", "[B, Sq, Hq, D]", "got [4, 8]"},
      [](AttentionInputs& in) { in.q = in.q[0][0]; });
  add("QOfIntegers", {"expected q", "float16", "got Int"}, [](AttentionInputs& in) { in.q = in.q.to(at::kInt); });
  add("UndefinedQ", {"q", "undefined"}, [](AttentionInputs& in) { in.q = at::Tensor(); });
  add("UndefinedK", {"k", "undefined"}, [](AttentionInputs& in) { in.k = at::Tensor(); });
  add("UndefinedV", {"v", "undefined"}, [](AttentionInputs& in) { in.v = at::Tensor(); });
  add("SlopesInTheOptionsToo", {"options without slopes", "got slopes in both"},
      [](AttentionInputs& in) { in.options.slopes(in.slopes); });
  add("KOfThreeDimensions", {"expected k", "[B, Sk, Hk, D]", "got [7, 2, 8]"},
      [](AttentionInputs& in) { in.k = in.k[0]; });
  add("KOfAnotherDtype", {"expected k", "dtype", "Float", "got Double"},
      [](AttentionInputs& in) { in.k = in.k.to(at::kDouble); });
  add("KOnAnotherDevice", {"expected k", "device", "got Float on meta"},
      [](AttentionInputs& in) { in.k = in.k.to(at::kMeta); });
  add("KOfAnotherBatch", {"expected k", "batch size of q, 2", "got [1, 7, 2, 8]"}, [](AttentionInputs& in) {
    in.k = in.k.narrow(0, 0, 1);
    in.v = in.v.narrow(0, 0, 1);
  });
  add("KOfAnotherHeadSize", {"same positive head size", "got 8 and 4"}, [](AttentionInputs& in) {
    in.k = in.k.narrow(3, 0, 4);
    in.v = in.v.narrow(3, 0, 4);
  });
  add("HeadsOfSizeZero", {"same positive head size", "got 0 and 0"}, [](AttentionInputs& in) {
    in.q = in.q.narrow(3, 0, 0);
    in.k = in.k.narrow(3, 0, 0);
    in.v = in.v.narrow(3, 0, 0);
  });
  add("HeadsThatDoNotDivide", {"multiple", "got 3 and 2"}, [](AttentionInputs& in) { in.q = in.q.narrow(2, 0, 3); });
  add("VOfAnotherShape", {"expected v", "[2, 7, 2, 8]", "got [2, 6, 2, 8]"},
      [](AttentionInputs& in) { in.v = in.v.narrow(1, 0, 6); });
  add("SlopesOfKeyHeads", {"expected slopes", "[Hq] = [4] or [B, Hq] = [2, 4]", "got [2]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.narrow(0, 0, 2); });
  add("SlopesOfOtherSequences", {"expected slopes", "[Hq] = [4] or [B, Hq] = [2, 4]", "got [3, 4]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.expand({3, 4}); });
  add("SlopesOfThreeDimensions", {"expected slopes", "got [1, 2, 4]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.expand({1, 2, 4}); });
  add_packed(
      "SlopesOfOtherPackedSequences", {"expected slopes", "[N, Hq] = [2, 4]", "got [1, 4]"},
      [](AttentionInputs& in) { in.slopes = in.slopes.unsqueeze(0); });
  add("SlopesOfHalf", {"expected slopes", "float32", "got Half"},
      [](AttentionInputs& in) { in.slopes = in.slopes.to(at::kHalf); });
  add("SlopesOnAnotherDevice", {"expected slopes", "device of q", "got meta"},
      [](AttentionInputs& in) { in.slopes = in.slopes.to(at::kMeta); });
  for (const int64_t offset : {int64_t{1} << 31, -(int64_t{1} << 31), std::numeric_limits<int64_t>::min()}) {
    add("OffsetNumber" + std::to_string(calls.size()), {"query_offset", "2^31", "got " + std::to_string(offset)},
        [offset](AttentionInputs& in) { in.options.query_offset(offset); });
  }
  add("NegativeLeftWindow", {"expected window_left", "not negative", "got -1"},
      [](AttentionInputs& in) { in.options.window_left(-1); });
  add("NegativeRightWindow", {"expected window_right", "not negative", "got -2"},
      [](AttentionInputs& in) { in.options.window(0, -2); });
  for (const double softcap : {0.0, -1.0, kInfinity, std::nan("")}) {
    add("SoftcapNumber" + std::to_string(calls.size()), {"expected softcap", "positive finite", "got "},
        [softcap](AttentionInputs& in) { in.options.softcap(softcap); });
  }
  add("SeqlensOfKeysAlone", {"both seqlens_q and seqlens_k", "query_offset", "got seqlens_k alone"},
      [=](AttentionInputs& in) { in.options.seqlens_k(lengths(in, {1, 2})); });
  add("SeqlensOfQueriesAlone", {"both seqlens_q and seqlens_k", "query_offset", "got seqlens_q alone"},
      [=](AttentionInputs& in) { in.options.seqlens_q(lengths(in, {1, 2})); });
  add("SeqlensOfAnotherBatch", {"expected seqlens_k", "[B] = [2]", "got [3]"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_k(lengths(in, {1, 2, 3})); });
  add("SeqlensOfFloats", {"expected seqlens_k", "int32 or int64", "got Float"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_k(lengths(in, {1, 2}).to(at::kFloat)); });
  add("SeqlensOnAnotherDevice", {"expected seqlens_q", "device of q", "got meta"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_q(lengths(in, {1, 2}).to(at::kMeta)); });
  add("UndefinedSeqlens", {"seqlens_q", "undefined"},
      [=](AttentionInputs& in) { in.options.query_offset(0).seqlens_q(at::Tensor()); });
  add("CuSeqlensOfAPaddedBatch", {"cu_seqlens", "packed", "got them with [2, 5, 4, 8]"},
      [=](AttentionInputs& in) { in.options.cu_seqlens_q(lengths(in, {0, 5})); });
  add("MaxSeqlenOfAPaddedBatch", {"max_seqlen", "packed"}, [](AttentionInputs& in) { in.options.max_seqlen_k(7); });
  add_packed("PackedWithoutCuSeqlens", {"expected cu_seqlens_q", "got none"}, [](AttentionInputs& in) {
    in.options.cu_seqlens_q(std::nullopt);
  });
  add_packed("PackedWithSeqlens", {"seqlens_q and seqlens_k", "packed"}, [=](AttentionInputs& in) {
    in.options.seqlens_k(lengths(in, {3, 9}));
  });
  add_packed("EmptyCuSeqlens", {"expected cu_seqlens_q", "[N + 1]", "got [0]"}, [=](AttentionInputs& in) {
    in.options.cu_seqlens_q(lengths(in, {}));
  });
  add_packed("CuSeqlensOfOtherNumbers", {"expected cu_seqlens_k", "[3]", "got [2]"}, [=](AttentionInputs& in) {
    in.options.cu_seqlens_k(lengths(in, {0, 12}));
  });
  add_packed("CuSeqlensOfFloats", {"expected cu_seqlens_q", "int32 or int64", "got Float"}, [=](AttentionInputs& in) {
    in.options.cu_seqlens_q(lengths(in, {0, 3, 12}).to(at::kFloat));
  });
  add_packed("NegativeMaxSeqlen", {"expected max_seqlen_q", "got -1"}, [](AttentionInputs& in) {
    in.options.max_seqlen_q(-1);
  });
  add_packed("OtherTokensWithoutCuSeqlensK", {"expected cu_seqlens_k", "12", "got 11"}, [](AttentionInputs& in) {
    in.options.cu_seqlens_k(std::nullopt);
    in.k = in.k.narrow(0, 0, 11);
    in.v = in.v.narrow(0, 0, 11);
  });
  return calls;
}

AttentionInputs valid_inputs(bool packed, at::DeviceType device) {
  AttentionCase c;
  if (packed) {
    c.q_len = c.k_len = 12;
    c.cu_seqlens_q = c.cu_seqlens_k = {0, 3, 12};
  }
  return make_attention_inputs(c, {device, at::kFloat});
}

class AlibiAttentionErrors : public ::testing::TestWithParam<std::tuple<at::DeviceType, BadCall>> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam())); }
};

TEST_P(AlibiAttentionErrors, NameWhatIsWrong) {
  const auto& [device, call] = GetParam();
  AttentionInputs in = valid_inputs(call.packed, device);
  call.spoil(in);
  std::vector<std::string> parts = call.parts;
  parts.emplace_back("posenc::alibi_attention: ");
  expect_error([&, &in = in] { attend(in); }, parts);
  // The device must still be usable.
  EXPECT_NO_THROW(attend(valid_inputs(call.packed, device)).sum().item<double>());
}

std::string error_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, BadCall>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiAttentionErrors,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(bad_calls())),
    error_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiAttentionErrors,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(bad_calls())),
    error_name);

// Values of seqlens and cu_seqlens are checked only on the CPU.
TEST(AlibiAttentionLengths, OnTheCpuAreRead) {
  AttentionInputs in = valid_inputs(/*packed=*/false, at::kCPU);
  for (const auto& bad : std::vector<std::vector<int64_t>>{{-1, 2}, {2, 8}}) {
    in.options.query_offset(0).seqlens_k(at::tensor(bad, at::kLong));
    expect_error([&] { attend(in); }, {"expected seqlens_k from 0 to 7", "got "});
  }
  AttentionInputs packed = valid_inputs(/*packed=*/true, at::kCPU);
  for (const auto& bad : std::vector<std::vector<int64_t>>{{0, 3, 13}, {0, 9, 3}, {-1, 3, 12}}) {
    packed.options.cu_seqlens_q(at::tensor(bad, at::kLong));
    expect_error([&] { attend(packed); }, {"expected cu_seqlens_q that rise from 0 to at most 12", "got "});
  }
  packed = valid_inputs(/*packed=*/true, at::kCPU);
  packed.options.max_seqlen_k(8);
  expect_error([&] { attend(packed); }, {"expected max_seqlen_k of at least 9", "got 8"});
  packed.options.max_seqlen_k(9);
  const at::Tensor out = attend(packed);
  packed.options.max_seqlen_k(std::nullopt).max_seqlen_q(std::nullopt);
  expect_same_bits(attend(packed), out);
}

class AlibiAttentionDeviceLengths : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttentionDeviceLengths, ::testing::Values(at::kCUDA), device_name);

TEST_P(AlibiAttentionDeviceLengths, OfPackedSequencesNeedTheirLongest) {
  AttentionInputs in = valid_inputs(/*packed=*/true, GetParam());
  in.options.max_seqlen_q(std::nullopt);
  expect_error([&] { attend(in); }, {"expected max_seqlen_q", "GPU"});
}

TEST_P(AlibiAttentionDeviceLengths, BeyondTheTensorsGiveNaNForTheirSequence) {
  AttentionInputs in = valid_inputs(/*packed=*/false, GetParam());
  const auto lengths = [&](const std::vector<int64_t>& values) { return at::tensor(values, at::kInt).to(device()); };
  in.options.seqlens_q(lengths({5, 5})).seqlens_k(lengths({8, 7}));
  const at::Tensor out = attend(in);
  EXPECT_TRUE(out[0].isnan().all().item<bool>());
  EXPECT_FALSE(out[1].isnan().any().item<bool>());
  AttentionInputs packed = valid_inputs(/*packed=*/true, GetParam());
  packed.options.max_seqlen_q(8).max_seqlen_k(8);  // the second sequence has 9 tokens
  const at::Tensor of_packed = attend(packed);
  EXPECT_FALSE(of_packed.narrow(0, 0, 3).isnan().any().item<bool>());
  EXPECT_TRUE(of_packed.narrow(0, 3, 9).isnan().all().item<bool>());
}

}  // namespace
}  // namespace posenc::test
