#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <posenc/reference.h>

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <algorithm>

// First, second and third derivatives of attention.
namespace posenc::test {
namespace {

/// One small call for each option.
std::vector<AttentionCase> small_cases() {
  std::vector<AttentionCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(AttentionCase&)>& change) {
    AttentionCase c;
    c.name = name;
    c.q_len = 3;
    c.k_len = 4;
    c.q_heads = 2;
    c.k_heads = 1;
    c.head_dim = 2;
    change(c);
    cases.push_back(c);
  };
  add("Plain", [](AttentionCase&) {});
  add("Scaled", [](AttentionCase& c) { c.scale = 0.3; });
  add("Causal", [](AttentionCase& c) { c.causal = true; });
  add("RowsWithNothingVisible", [](AttentionCase& c) { c.causal = true, c.query_offset = -1; });
  add("Seqlens", [](AttentionCase& c) { c.seqlens_q = {2, 3}, c.seqlens_k = {4, 0}; });
  add("Packed", [](AttentionCase& c) { c.q_len = c.k_len = 4, c.cu_seqlens_q = {0, 1, 1, 4}, c.causal = true; });
  add("SlopesOfSequences", [](AttentionCase& c) { c.slopes_of_sequences = true; });
  add("SlopesOfSequencesPacked", [](AttentionCase& c) {
    c.slopes_of_sequences = c.causal = true;
    c.q_len = c.k_len = 4;
    c.cu_seqlens_q = {0, 1, 1, 4};
  });
  add("Window", [](AttentionCase& c) { c.q_len = c.k_len = 4, c.window_left = 1, c.window_right = 0; });
  add("WindowAndSeqlens",
      [](AttentionCase& c) { c.window_left = c.window_right = 1, c.seqlens_q = {2, 3}, c.seqlens_k = {4, 1}; });
  add("Softcap", [](AttentionCase& c) { c.softcap = 0.7, c.causal = true; });
  add("SoftcapPacked", [](AttentionCase& c) {
    c.softcap = 2;
    c.q_len = c.k_len = 4;
    c.cu_seqlens_q = {0, 1, 1, 4};
  });
  add("WithoutSlopes", [](AttentionCase& c) { c.with_slopes = false, c.causal = true; });
  add("WithoutSlopesSeqlens",
      [](AttentionCase& c) { c.with_slopes = false, c.seqlens_q = {2, 3}, c.seqlens_k = {4, 0}; });
  add("WithoutSlopesPacked",
      [](AttentionCase& c) { c.with_slopes = false, c.q_len = c.k_len = 4, c.cu_seqlens_q = {0, 1, 1, 4}; });
  add("Strided", [](AttentionCase& c) { c.strides = Strides::reversed, c.every_other_slope = true; });
  return cases;
}

/// The differentiable arguments: q, k, v and, if there are some, slopes. `inputs_of` is the inverse.
TensorList arguments_of(const AttentionInputs& in) {
  return in.slopes.defined() ? TensorList{in.q, in.k, in.v, in.slopes} : TensorList{in.q, in.k, in.v};
}

AttentionInputs inputs_of(const TensorList& arguments, const AttentionOptions& options) {
  return {arguments[0], arguments[1], arguments[2], arguments.size() > 3 ? arguments[3] : at::Tensor(), options};
}

class AlibiAttentionDifferences : public ::testing::TestWithParam<std::tuple<at::DeviceType, AttentionCase>> {
 protected:
  void SetUp() override {
    require_device(std::get<0>(GetParam()));
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    AttentionInputs in = make_attention_inputs(std::get<1>(GetParam()), {std::get<0>(GetParam()), at::kDouble});
    if (in.slopes.defined()) {
      in.slopes = in.slopes.to(at::kDouble);
    }
    inputs_ = attention_leaves(in);
  }

  TensorList arguments() const { return arguments_of(inputs_); }

  Differentiable function(bool with_lse) const {
    return [options = inputs_.options, with_lse](const TensorList& arguments) -> TensorList {
      const auto [out, lse] = attend_with_lse(inputs_of(arguments, options));
      // Inner products with an lse of minus infinity would be infinite or NaN.
      return with_lse ? TensorList{out, lse.masked_fill(lse.detach().isinf(), 0)} : TensorList{out};
    };
  }

  AttentionInputs inputs_;
};

TEST_P(AlibiAttentionDifferences, Gradients) {
  gradcheck(function(/*with_lse=*/false), arguments(), kSmooth);
}

TEST_P(AlibiAttentionDifferences, GradientsThroughLse) {
  gradcheck(function(/*with_lse=*/true), arguments(), kSmooth);
}

TEST_P(AlibiAttentionDifferences, SecondDerivatives) {
  gradgradcheck(function(/*with_lse=*/true), arguments(), kSmooth);
}

std::string difference_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, AttentionCase>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiAttentionDifferences,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(small_cases())),
    difference_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiAttentionDifferences,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(small_cases())),
    difference_name);

// ---------------------------------------------------------------------------------------------------------------------
// Against autograd of the reference version

using Attention = std::tuple<at::Tensor, at::Tensor> (*)(const AttentionInputs&);

/// Derivatives of orders 1 to `order` of a scalar function of `inputs`. Each order differentiates the inner product of
/// the previous results with random cotangents.
std::vector<TensorList> derivatives(
    const TensorList& inputs,
    const AttentionOptions& options,
    Attention attention,
    int order) {
  at::manual_seed(7);
  const auto [out, lse] = attention(inputs_of(inputs, options));
  TensorList results{out.pow(2), lse.masked_fill(lse.detach().isinf(), 0).sin()};
  std::vector<TensorList> all;
  for (int i = 0; i < order; ++i) {
    TensorList cotangents = random_like(results);
    results = gradients(results, inputs, cotangents, /*create_graph=*/true);
    all.push_back(results);
    for (at::Tensor& result : results) {
      result = result.requires_grad() ? result : result + 0 * inputs[0].sum();
    }
  }
  return all;
}

void expect_derivatives(const TensorList& inputs, const AttentionOptions& options, int order) {
  const std::vector<TensorList> actual = derivatives(inputs, options, attend_with_lse, order);
  const std::vector<TensorList> expected = derivatives(inputs, options, reference_attention, order);
  for (int i = 0; i < order; ++i) {
    for (size_t input = 0; input < inputs.size(); ++input) {
      SCOPED_TRACE(c10::str("derivative ", i + 1, ", input ", input));
      const double size = 1 + expected[i][input].abs().max().item<double>();
      EXPECT_LE((actual[i][input] - expected[i][input]).abs().max().item<double>(), 1e-11 * size);
    }
  }
}

TEST_P(AlibiAttentionDifferences, ThreeDerivativesAreThoseOfTheReference) {
  expect_derivatives(arguments(), inputs_.options, 3);
}

// ---------------------------------------------------------------------------------------------------------------------
// Inputs that are the same tensor or depend on each other

class AlibiAttentionDerivatives : public DeviceTest {
 protected:
  /// A tensor `[1, S, 1, 1]` of `values`.
  at::Tensor sequence(const std::vector<double>& values) const {
    return at::tensor(values, at::kDouble).view({1, -1, 1, 1}).to(device());
  }

  at::Tensor attend_to(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) const {
    const at::Tensor slopes = at::full({1}, 0.5, at::dtype(at::kDouble).device(device()));
    return alibi_attention(q, k, v, slopes, ALiBiAttentionOptions().scale(1));
  }

  void expect_sequence(const at::Tensor& actual, const std::vector<double>& expected) const {
    constexpr double kPrintedDigits = 5e-6;
    EXPECT_LE((actual.detach() - sequence(expected)).abs().max().item<double>(), kPrintedDigits) << actual;
  }

  static AttentionInputs inputs(const AttentionCase& c) { return make_attention_inputs(c, {GetParam(), at::kDouble}); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttentionDerivatives, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttentionDerivatives, ::testing::Values(at::kCUDA), device_name);

TEST_P(AlibiAttentionDerivatives, OfOneTensorAsKeysAndValuesAreCountedOnce) {
  const at::Tensor q = sequence({1, 2});
  const at::Tensor x = sequence({1, 3}).requires_grad_();
  for (const bool create_graph : {false, true}) {
    const at::Tensor out = attend_to(q, x, x);
    expect_sequence(gradients({out.sum()}, {x}, {at::ones_like(out.sum())}, create_graph)[0], {-0.14835, 2.14835});
  }
}

TEST_P(AlibiAttentionDerivatives, OfValuesAloneCanBeDifferentiatedAgain) {
  const at::Tensor v = sequence({1, 3}).requires_grad_();
  const at::Tensor out = attend_to(sequence({1, 2}), sequence({1, 3}), v);
  expect_sequence(
      gradients({out.sum()}, {v}, {at::ones_like(out.sum())}, /*create_graph=*/true)[0], {0.19341, 1.80659});
}

TEST_P(AlibiAttentionDerivatives, OfQueriesTwiceAreTheHessian) {
  const at::Tensor q = sequence({1, 2}).requires_grad_();
  const at::Tensor x = sequence({1, 3});
  const at::Tensor out = attend_to(q, x, x);
  const at::Tensor first = gradients({out.sum()}, {q}, {at::ones_like(out.sum())}, /*create_graph=*/true)[0];
  // The Hessian is diagonal, as each output depends on its own query only.
  expect_sequence(gradients({first.sum()}, {q}, {at::ones_like(first.sum())})[0], {-0.75784, -0.08502});
}

TEST_P(AlibiAttentionDerivatives, OfSharedInputsAreThoseOfTheReference) {
  AttentionCase c;
  c.q_len = c.k_len = 4;
  c.q_heads = c.k_heads = 2;
  c.head_dim = 3;
  c.causal = true;
  AttentionInputs in = inputs(c);
  in.slopes = in.slopes.to(at::kDouble);
  const at::Tensor x = in.q.clone().requires_grad_();
  const std::vector<std::pair<const char*, std::function<TensorList()>>> ways{
      {"q = k = v", [&] { return TensorList{x, x, x, in.slopes}; }},
      {"k = v", [&] { return TensorList{in.q, x, x, in.slopes}; }},
      {"q, k = g(q), v = h(k)",
       [&] {
         const at::Tensor k = x.sin();
         return TensorList{x, k, k * x, in.slopes};
       }},
      {"slopes of q", [&] { return TensorList{x, in.k, in.v, x.pow(2).mean({0, 1, 3})}; }},
      {"views of one projection",
       [&] {
         const at::Tensor projection = at::cat({x, x * 2, x * x}, 2);
         return TensorList{projection.slice(2, 0, 2), projection.slice(2, 2, 4), projection.slice(2, 4, 6), in.slopes};
       }},
  };
  const auto differentiate = [&x](const at::Tensor& out) {
    const at::Tensor first = gradients({out.pow(2)}, {x}, {at::ones_like(out)}, /*create_graph=*/true)[0];
    // A gradient penalty.
    return TensorList{first, gradients({first.pow(2)}, {x}, {at::ones_like(first)})[0]};
  };
  for (const auto& [name, arguments] : ways) {
    SCOPED_TRACE(name);
    const TensorList a = arguments();
    const TensorList e = arguments();
    const TensorList actual = differentiate(alibi_attention(a[0], a[1], a[2], a[3], in.options));
    const TensorList expected =
        differentiate(std::get<0>(reference::alibi_attention(e[0], e[1], e[2], e[3], in.options)));
    for (size_t i = 0; i < actual.size(); ++i) {
      const double size = 1 + expected[i].abs().max().item<double>();
      EXPECT_LE((actual[i] - expected[i]).abs().max().item<double>(), 1e-12 * size) << "derivative " << i + 1;
    }
  }
}

TEST_P(AlibiAttentionDerivatives, OfEachGradientAloneAreThoseOfTheReference) {
  AttentionInputs in = inputs(AttentionCase());
  in.slopes = in.slopes.to(at::kDouble);
  in = attention_leaves(in);
  const TensorList leaves{in.q, in.k, in.v, in.slopes};
  const auto second = [&leaves](const at::Tensor& out, size_t of) {
    const at::Tensor first = gradients({out.pow(2)}, leaves, {at::ones_like(out)}, /*create_graph=*/true)[of];
    return gradients({first.pow(2)}, leaves, {at::ones_like(first)});
  };
  const at::Tensor of_reference = std::get<0>(reference::alibi_attention(in.q, in.k, in.v, in.slopes, in.options));
  for (size_t of = 0; of < leaves.size(); ++of) {
    const TensorList actual = second(attend(in), of);
    const TensorList expected = second(of_reference, of);
    for (size_t by = 0; by < leaves.size(); ++by) {
      const double size = 1 + expected[by].abs().max().item<double>();
      EXPECT_LE((actual[by] - expected[by]).abs().max().item<double>(), 1e-11 * size)
          << "gradient " << of << " by input " << by;
    }
  }
}

/// On a CPU 64 rows of 2 x 4096 scores are computed at a time.
TEST_P(AlibiAttentionDerivatives, OfSeveralBlocksOfRowsAreThoseOfTheReference) {
  AttentionCase c;
  c.batch = 1;
  c.q_len = 130;
  c.k_len = 4096;
  c.q_heads = c.k_heads = 2;
  c.head_dim = 2;
  c.largest_slope = 0x1p-8;
  c.causal = true;
  AttentionInputs in = inputs(c);
  in.slopes = in.slopes.to(at::kDouble);
  in = attention_leaves(in);
  expect_derivatives({in.q, in.k, in.v, in.slopes}, in.options, 2);
}

TEST_P(AlibiAttentionDerivatives, GradientsReachOnlyWhatRequiresThem) {
  AttentionInputs in = inputs(AttentionCase());
  in.v.requires_grad_();
  const at::Tensor out = attend(in);
  EXPECT_TRUE(out.requires_grad());
  AttentionInputs all = attention_leaves(in);
  const at::Tensor of_all = attend(all);
  expect_same_bits(
      gradients({out}, {in.v}, {at::ones_like(out)})[0], gradients({of_all}, {all.v}, {at::ones_like(out)})[0]);
}

TEST_P(AlibiAttentionDerivatives, NothingIsRecordedWhereNothingRequiresGrad) {
  EXPECT_FALSE(attend(inputs(AttentionCase())).requires_grad());
}

TEST_P(AlibiAttentionDerivatives, WithCreateGraphAreThePlainOnesThroughEachOutput) {
  const AttentionInputs in = attention_leaves(inputs(AttentionCase()));
  const auto [out, lse] = attend_with_lse(in);
  for (const at::Tensor& result : {out, lse}) {
    const at::Tensor cotangent = at::randn(result.sizes(), at::kDouble).to(result.options());
    const TensorList plain = gradients({result}, {in.q, in.k, in.v, in.slopes}, {cotangent});
    const TensorList graph = gradients({result}, {in.q, in.k, in.v, in.slopes}, {cotangent}, /*create_graph=*/true);
    for (size_t i = 0; i < plain.size(); ++i) {
      expect_same_bits(graph[i].detach(), plain[i]);
    }
  }
}

/// Fails if the gradient uses the rounded `out`: its rounding error times distances of thousands exceeds the gradient.
TEST_P(AlibiAttentionDerivatives, OfSlopesOverManyKeysAreWithinOnePercent) {
  AttentionCase c;
  c.batch = 1;
  c.q_len = 8;
  c.k_len = 4096;
  c.q_heads = c.k_heads = 2;
  c.head_dim = 16;
  c.largest_slope = 0x1p-8;
  c.causal = true;
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    const AttentionInputs narrow = make_attention_inputs(c, {GetParam(), dtype});
    const at::Tensor grad = (at::randn(narrow.q.sizes(), at::kFloat) + 4).to(narrow.q.options());
    const auto slopes_gradient = [&](const AttentionInputs& inputs) {
      const AttentionInputs in = attention_leaves(inputs);
      const at::Tensor out = attend(in);
      return gradients({out}, {in.slopes}, {grad.to(out.scalar_type())})[0].to(at::kDouble);
    };
    EXPECT_LE(
        relative_error(slopes_gradient(narrow), slopes_gradient(in_float64(narrow))), dtype == at::kFloat ? 1e-5 : 0.01)
        << dtype;
  }
}

TEST_P(AlibiAttentionDerivatives, WithinAutocastKeepTheirDtypes) {
  const AttentionInputs in = attention_leaves(make_attention_inputs(AttentionCase(), {GetParam(), at::kFloat}));
  const at::Tensor out = attend(in);
  const at::Tensor cotangent = at::ones_like(out);
  const TensorList expected = gradients({out}, {in.q, in.k, in.v, in.slopes}, {cotangent}, /*create_graph=*/true);
  at::autocast::set_autocast_enabled(GetParam(), true);
  at::autocast::set_autocast_dtype(GetParam(), at::kBFloat16);
  const TensorList actual = gradients({out}, {in.q, in.k, in.v, in.slopes}, {cotangent}, /*create_graph=*/true);
  const at::Tensor second = gradients({actual[0]}, {in.q}, {at::ones_like(actual[0])})[0];
  at::autocast::set_autocast_enabled(GetParam(), false);
  at::autocast::clear_cache();
  for (size_t i = 0; i < expected.size(); ++i) {
    expect_same_bits(actual[i].detach(), expected[i].detach());
  }
  expect_same_bits(second, gradients({expected[0]}, {in.q}, {at::ones_like(actual[0])})[0]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Saved state

TEST_P(AlibiAttentionDerivatives, NoticeLengthsThatWereRefilled) {
  const auto integers = at::dtype(at::kLong).device(device());
  const at::Tensor lengths = at::full({1}, 1, integers);
  const at::Tensor begins = at::tensor({0, 1}, integers);
  const at::Tensor q = sequence({1, 1}).requires_grad_();
  const at::Tensor slopes = at::full({1}, 0.5, at::dtype(at::kDouble).device(device()));
  const at::Tensor padded = alibi_attention(
      q, sequence({0, 1}), sequence({1, 5}), slopes,
      ALiBiAttentionOptions().seqlens_q(at::full({1}, 2, integers)).seqlens_k(lengths));
  const at::Tensor packed = alibi_attention(
      q.squeeze(0), sequence({0, 1}).squeeze(0), sequence({1, 5}).squeeze(0), slopes,
      ALiBiAttentionOptions().cu_seqlens_q(begins).max_seqlen_q(2));
  lengths.fill_(2);
  begins.select(0, 1).fill_(2);
  for (const at::Tensor& out : {padded, packed}) {
    for (const bool create_graph : {false, true}) {
      expect_error(
          [&] { gradients({out}, {q}, {at::ones_like(out)}, create_graph); }, {"modified by an inplace operation"});
    }
  }
}

}  // namespace
}  // namespace posenc::test
