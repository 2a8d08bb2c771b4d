#include "gradcheck.h"
#include "qk_norm_support.h"

#include <posenc/qk_norm_rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>

namespace posenc::test {
namespace {

/// A valid call: q `[2, 3, 4, 8]`, k `[2, 3, 2, 8]`, cos and sin `[6, 4]`.
QKNormInputs valid_inputs(at::Device device) {
  RotaryCase c;
  c.tokens = 3;
  c.head_dim = c.rotary_dim = 8;
  return make_qk_norm_inputs(c, {device.type(), at::kFloat});
}

struct BadCall {
  std::string name;
  std::vector<std::string> parts;
  std::function<void(QKNormInputs&)> spoil;
};

std::ostream& operator<<(std::ostream& stream, const BadCall& call) {
  return stream << call.name;
}

std::vector<BadCall> bad_calls() {
  return {
      // One case for each check that this operator shares with the other rotary operators.
      {"UndefinedQueries", {"expected q", "undefined"}, [](QKNormInputs& in) { in.rotary.q = at::Tensor(); }},
      {"QueriesOfTwoDimensions",
       {"expected q", "[B, S, H, D] or [T, H, D]", "got [4, 8]"},
       [](QKNormInputs& in) { in.rotary.q = in.rotary.q[0][0]; }},
      {"QueriesOfIntegers",
       {"expected q", "float16, bfloat16, float32 or float64", "Int"},
       [](QKNormInputs& in) { in.rotary.q = in.rotary.q.to(at::kInt); }},
      {"KeysOfAnotherDtype",
       {"expected k", "dtype of q", "Float", "Double"},
       [](QKNormInputs& in) { in.rotary.k = in.rotary.k.to(at::kDouble); }},
      {"KeysOfAnotherLength",
       {"expected k", "head dimension", "[2, 2, 2, 8]"},
       [](QKNormInputs& in) { in.rotary.k = in.rotary.k.narrow(1, 0, 2); }},
      {"HalfTables",
       {"expected cos", "Float", "got Half"},
       [](QKNormInputs& in) { in.rotary.cos = in.rotary.cos.to(at::kHalf); }},
      {"TablesTooWide",
       {"rotary width", "8", "got 10"},
       [](QKNormInputs& in) { in.rotary.cos = in.rotary.sin = at::zeros({6, 5}, in.rotary.cos.options()); }},
      {"TablesTooShort",
       {"cos and sin", "at least 3 rows"},
       [](QKNormInputs& in) {
         in.rotary.cos = in.rotary.cos.narrow(0, 0, 2);
         in.rotary.sin = in.rotary.sin.narrow(0, 0, 2);
       }},
      {"PositionsOfFloat",
       {"expected positions", "int32 or int64", "got Float"},
       [](QKNormInputs& in) { in.rotary.positions = at::zeros({3}, in.rotary.q.options()); }},
      {"PairAxesWithoutPositions",
       {"expected positions", "with pair_axes"},
       [](QKNormInputs& in) { in.rotary.pair_axes = {0, 0, 0, 0}; }},
      // Weights.
      {"UndefinedQueryWeight",
       {"expected q_weight", "undefined"},
       [](QKNormInputs& in) { in.q_weight = at::Tensor(); }},
      {"UndefinedKeyWeight", {"expected k_weight", "undefined"}, [](QKNormInputs& in) { in.k_weight = at::Tensor(); }},
      {"QueryWeightOfAnotherSize",
       {"expected q_weight", "[D] = [8]", "got [4]"},
       [](QKNormInputs& in) { in.q_weight = in.q_weight.narrow(0, 0, 4); }},
      {"KeyWeightOfTwoDimensions",
       {"expected k_weight", "[D] = [8]", "got [2, 8]"},
       [](QKNormInputs& in) { in.k_weight = at::ones({2, 8}, in.k_weight.options()); }},
      {"QueryWeightOfAScalar",
       {"expected q_weight", "[D] = [8]", "got []"},
       [](QKNormInputs& in) { in.q_weight = at::ones({}, in.q_weight.options()); }},
      {"HalfWeightForFloat",
       {"expected q_weight", "of dtype Float", "got Half"},
       [](QKNormInputs& in) { in.q_weight = in.q_weight.to(at::kHalf); }},
      {"DoubleWeightForFloat",
       {"expected k_weight", "of dtype Float", "got Double"},
       [](QKNormInputs& in) { in.k_weight = in.k_weight.to(at::kDouble); }},
      {"BFloat16WeightForHalf",
       {"expected q_weight", "of dtype Half or Float", "got BFloat16"},
       [](QKNormInputs& in) {
         in.rotary.q = in.rotary.q.to(at::kHalf);
         in.rotary.k = in.rotary.k.to(at::kHalf);
         in.q_weight = in.q_weight.to(at::kBFloat16);
       }},
      {"WeightsOfDifferentDtypes",
       {"expected k_weight of the dtype of q_weight", "Half", "got Float"},
       [](QKNormInputs& in) {
         in.rotary.q = in.rotary.q.to(at::kHalf);
         in.rotary.k = in.rotary.k.to(at::kHalf);
         in.q_weight = in.q_weight.to(at::kHalf);
       }},
      {"QueryWeightOnAnotherDevice",
       {"expected q_weight", "device of q", "meta"},
       [](QKNormInputs& in) { in.q_weight = in.q_weight.to(at::kMeta); }},
      {"EpsOfZero", {"positive, finite eps", "got 0"}, [](QKNormInputs& in) { in.eps = 0; }},
      {"NegativeEps", {"positive, finite eps", "got -1"}, [](QKNormInputs& in) { in.eps = -1; }},
      {"InfiniteEps",
       {"positive, finite eps", "got inf"},
       [](QKNormInputs& in) { in.eps = std::numeric_limits<double>::infinity(); }},
      {"EpsThatIsNoNumber",
       {"positive, finite eps", "got nan"},
       [](QKNormInputs& in) { in.eps = std::numeric_limits<double>::quiet_NaN(); }},
  };
}

class QKNormRotaryEmbeddingErrors : public ::testing::TestWithParam<std::tuple<at::DeviceType, BadCall>> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam())); }
  at::Device device() const { return at::Device(std::get<0>(GetParam())); }
  const BadCall& bad_call() const { return std::get<1>(GetParam()); }
};

TEST_P(QKNormRotaryEmbeddingErrors, NameWhatIsWrong) {
  std::vector<std::string> parts = bad_call().parts;
  parts.emplace_back("posenc::qk_norm_rotary_embedding: ");
  QKNormInputs in = valid_inputs(device());
  bad_call().spoil(in);
  expect_error([&] { qk_norm_rotate(in); }, parts);
  const QKNormInputs good = valid_inputs(device());
  const auto [q, k] = qk_norm_rotate(good);
  expect_within(q, scalar_qk_norm(good, good.rotary.q, good.q_weight));
}

TEST_P(QKNormRotaryEmbeddingErrors, AreTheSameWithoutData) {
  if (std::get<0>(GetParam()) != at::kCPU || bad_call().name == "QueryWeightOnAnotherDevice") {
    GTEST_SKIP() << "one device is enough, and another one than that";
  }
  QKNormInputs in = valid_inputs(at::kMeta);
  bad_call().spoil(in);
  expect_error([&] { qk_norm_rotate(in); }, bad_call().parts);
}

std::string error_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, BadCall>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    QKNormRotaryEmbeddingErrors,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(bad_calls())),
    error_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    QKNormRotaryEmbeddingErrors,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(bad_calls())),
    error_name);

// ---------------------------------------------------------------------------------------------------------------------
// The backward operator, which Python can call directly

std::vector<c10::IValue> call_backward(const QKNormInputs& in, const c10::IValue& grad_q, const c10::IValue& grad_k) {
  std::vector<c10::IValue> stack{
      grad_q,
      grad_k,
      in.rotary.q,
      in.rotary.k,
      in.q_weight,
      in.k_weight,
      in.rotary.cos,
      in.rotary.sin,
      /*positions=*/c10::IValue(),
      in.eps,
      /*unit_offset=*/false,
      /*interleaved=*/false,
      /*conjugate=*/false,
      /*pair_axes=*/std::vector<int64_t>(),
      /*weights_grad=*/true};
  c10::Dispatcher::singleton().findSchemaOrThrow("posenc::qk_norm_rotary_embedding_backward", "").callBoxed(stack);
  return stack;
}

TEST(QKNormRotaryEmbeddingBackward, OfAbsentGradientsIsUndefined) {
  const QKNormInputs in = valid_inputs(at::kCPU);
  const auto results = call_backward(in, c10::IValue(), at::ones_like(in.rotary.k));
  EXPECT_FALSE(results[0].toTensor().defined());
  EXPECT_EQ(results[1].toTensor().sizes(), in.rotary.k.sizes());
  EXPECT_FALSE(results[2].toTensor().defined());
  EXPECT_EQ(results[3].toTensor().sizes(), in.k_weight.sizes());
}

TEST(QKNormRotaryEmbeddingBackward, RejectsBadGradients) {
  for (const bool requires_grad : {false, true}) {
    const QKNormInputs in = requires_grad ? with_leaves(valid_inputs(at::kCPU)) : valid_inputs(at::kCPU);
    const at::Tensor q = in.rotary.q.detach();
    const at::Tensor k = in.rotary.k.detach();
    const auto expect_rejected = [&](const at::Tensor& grad_q, const at::Tensor& grad_k,
                                     std::vector<std::string> parts) {
      parts.emplace_back("posenc::qk_norm_rotary_embedding_backward: ");
      expect_error([&] { call_backward(in, grad_q, grad_k); }, parts);
    };
    expect_rejected(k, k, {"expected grad_q", "[2, 3, 4, 8]", "got [2, 3, 2, 8]"});
    expect_rejected(q, k.to(at::kHalf), {"expected grad_k", "Float", "got", "Half"});
    expect_rejected(q.to(at::kMeta), k, {"expected grad_q", "cpu", "meta"});
  }
}

}  // namespace
}  // namespace posenc::test
