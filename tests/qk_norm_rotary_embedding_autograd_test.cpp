#include "gradcheck.h"
#include "qk_norm_support.h"

#include <posenc/qk_norm_rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/autograd.h>

namespace posenc::test {
namespace {

/// One small call for each code path.
std::vector<RotaryCase> small_cases() {
  std::vector<RotaryCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.name = name;
    c.batch = 1;  // second derivatives evaluate the function many times per element
    c.tokens = 2;
    c.q_heads = 2;
    c.k_heads = 1;
    c.head_dim = 6;
    c.rotary_dim = 4;
    c.spare_rows = 1;
    change(c);
    cases.push_back(c);
  };
  add("NoPositions", [](RotaryCase&) {});
  add("Interleaved", [](RotaryCase& c) { c.interleaved = true; });
  add("Conjugate", [](RotaryCase& c) { c.conjugate = true; });
  add("FullWidth", [](RotaryCase& c) { c.head_dim = 4; });
  add("Packed", [](RotaryCase& c) { c.packed = true; });
  add("PositionsPerBatch", [](RotaryCase& c) {
    c.batch = 2;
    c.positions = PositionShape::per_batch;
  });
  add("TwoAxes", [](RotaryCase& c) {
    c.axes = 2;
    c.positions = PositionShape::per_batch;
  });
  add("TablesPerToken", [](RotaryCase& c) {
    c.batch = 2;
    c.tables = TableShape::per_token;
  });
  add("StridedInputs", [](RotaryCase& c) {
    c.q_strides = Strides::head_slice;
    c.k_strides = Strides::one_head;
  });
  return cases;
}

TensorList arguments_of(const QKNormInputs& in) {
  return {in.rotary.q, in.rotary.k, in.q_weight, in.k_weight, in.rotary.cos, in.rotary.sin};
}

Differentiable function_of(const QKNormInputs& in) {
  return [in](const TensorList& arguments) -> TensorList {
    QKNormInputs at_point = in;
    at_point.rotary.q = arguments[0];
    at_point.rotary.k = arguments[1];
    at_point.q_weight = arguments[2];
    at_point.k_weight = arguments[3];
    at_point.rotary.cos = arguments[4];
    at_point.rotary.sin = arguments[5];
    const auto [q, k] = qk_norm_rotate(at_point);
    return {q, k};
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Central differences in float64

class QKNormRotaryEmbeddingDifferences : public ::testing::TestWithParam<std::tuple<at::DeviceType, RotaryCase>> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam())); }

  /// `eps` is large enough to keep derivatives of order one even for heads with a small norm.
  QKNormInputs inputs(bool unit_offset) const {
    QKNormInputs in = make_qk_norm_inputs(std::get<1>(GetParam()), {std::get<0>(GetParam()), at::kDouble}, unit_offset);
    in.eps = 0.25;
    return in;
  }
};

TEST_P(QKNormRotaryEmbeddingDifferences, GradientsOfEverything) {
  for (const bool unit_offset : {false, true}) {
    const QKNormInputs in = with_leaves(inputs(unit_offset));
    gradcheck(function_of(in), arguments_of(in), kSmooth);
  }
}

TEST_P(QKNormRotaryEmbeddingDifferences, GradientsOfTensorsAndWeights) {
  const QKNormInputs in = with_leaves(inputs(false), /*tables=*/false);
  gradcheck(function_of(in), arguments_of(in), kSmooth);
}

TEST_P(QKNormRotaryEmbeddingDifferences, SecondDerivativesOfEverything) {
  const QKNormInputs in = with_leaves(inputs(true));
  gradgradcheck(function_of(in), arguments_of(in), kSmooth);
}

TEST_P(QKNormRotaryEmbeddingDifferences, SecondDerivativesOfTheTensorsAlone) {
  QKNormInputs in = with_leaves(inputs(false), /*tables=*/false);
  in.q_weight = in.q_weight.detach();
  in.k_weight = in.k_weight.detach();
  gradgradcheck(function_of(in), arguments_of(in), kSmooth);
}

std::string case_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, RotaryCase>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    QKNormRotaryEmbeddingDifferences,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(small_cases())),
    case_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    QKNormRotaryEmbeddingDifferences,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(small_cases())),
    case_name);

// ---------------------------------------------------------------------------------------------------------------------
// The graph

class QKNormRotaryEmbeddingGraph : public DeviceTest {
 protected:
  QKNormInputs inputs(at::ScalarType dtype = at::kFloat) const {
    return make_qk_norm_inputs(RotaryCase(), {GetParam(), dtype});
  }
  at::Tensor random_like(const at::Tensor& x) const { return random_tensor(x.sizes(), {GetParam(), x.scalar_type()}); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, QKNormRotaryEmbeddingGraph, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, QKNormRotaryEmbeddingGraph, ::testing::Values(at::kCUDA), device_name);

TEST_P(QKNormRotaryEmbeddingGraph, OutputRequiresGradWhenAnyArgumentDoes) {
  const QKNormInputs none = inputs();
  EXPECT_FALSE(std::get<0>(qk_norm_rotate(none)).requires_grad());
  for (size_t i = 0; i < 6; ++i) {
    TensorList arguments = arguments_of(none);
    arguments[i] = arguments[i].detach().requires_grad_();
    const TensorList outputs = function_of(none)(arguments);
    EXPECT_TRUE(outputs[0].requires_grad()) << i;
    EXPECT_TRUE(outputs[1].requires_grad()) << i;
  }
}

TEST_P(QKNormRotaryEmbeddingGraph, EachGradientAloneIsTheOneAmongAll) {
  const QKNormInputs all = with_leaves(inputs());
  const at::Tensor grad_q = random_like(all.rotary.q);
  const at::Tensor grad_k = random_like(all.rotary.k);
  const TensorList expected = gradients(function_of(all)(arguments_of(all)), arguments_of(all), {grad_q, grad_k});
  for (size_t i = 0; i < 6; ++i) {
    SCOPED_TRACE(i);
    TensorList arguments = arguments_of(inputs());
    for (size_t j = 0; j < 6; ++j) {
      arguments[j] = arguments_of(all)[j].detach();
    }
    arguments[i].requires_grad_();
    const TensorList found = gradients(function_of(all)(arguments), arguments, {grad_q, grad_k});
    expect_same_bits(found[i], expected[i]);
  }
}

TEST_P(QKNormRotaryEmbeddingGraph, OnlyOneOutputIsUsed) {
  for (const bool use_q : {false, true}) {
    const QKNormInputs in = with_leaves(inputs());
    const auto [q, k] = qk_norm_rotate(in);
    const at::Tensor& used = use_q ? q : k;
    const at::Tensor grad = random_like(used);
    torch::autograd::backward({used}, {grad});
    const QKNormInputs plain = with_leaves(in, /*tables=*/false);
    const at::Tensor& x = use_q ? in.rotary.q : in.rotary.k;
    const at::Tensor& weight = use_q ? in.q_weight : in.k_weight;
    const ExpectedGradients expected = scalar_qk_norm_gradients(plain, x, weight, grad);
    expect_within(x.grad(), expected.input);
    expect_within(weight.grad(), expected.weight);
    const at::Tensor& other = use_q ? in.rotary.k : in.rotary.q;
    const at::Tensor& other_weight = use_q ? in.k_weight : in.q_weight;
    EXPECT_FALSE(other.grad().defined());
    EXPECT_FALSE(other_weight.grad().defined());
    EXPECT_TRUE(in.rotary.cos.grad().defined());
  }
}

TEST_P(QKNormRotaryEmbeddingGraph, TableGradientsAreThoseOfTheRotationOfTheNormalised) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
    const QKNormInputs in = with_leaves(inputs(dtype));
    const auto [q, k] = qk_norm_rotate(in);
    const at::Tensor grad_q = random_like(q);
    const at::Tensor grad_k = random_like(k);
    const TensorList found = gradients({q, k}, {in.rotary.cos, in.rotary.sin}, {grad_q, grad_k});
    QKNormInputs unrotated = in;
    unrotated.rotary.cos = at::ones_like(in.rotary.cos);
    unrotated.rotary.sin = at::zeros_like(in.rotary.sin);
    const at::Tensor z_q = scalar_qk_norm(unrotated, in.rotary.q, in.q_weight).value;
    const at::Tensor z_k = scalar_qk_norm(unrotated, in.rotary.k, in.k_weight).value;
    const TableGradients expected = scalar_table_gradients(in.rotary, {{grad_q, z_q}, {grad_k, z_k}});
    // Each term has the rounding errors of a sum over head_dim, and about 32 more.
    const double u = unit_roundoff(dtype) * (static_cast<double>(in.rotary.q.size(-1)) + 32);
    const at::Tensor terms = expected.terms * unit_roundoff(dtype) + u;
    expect_within(found[0], expected.dcos, expected.dcos_magnitude * terms);
    expect_within(found[1], expected.dsin, expected.dsin_magnitude * terms);
  }
}

TEST_P(QKNormRotaryEmbeddingGraph, GradientOfASumMatchesTheScalarLoop) {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    RotaryCase c;
    c.head_dim = c.rotary_dim = 64;
    const QKNormInputs in = with_leaves(make_qk_norm_inputs(c, {GetParam(), dtype}), /*tables=*/false);
    const auto [q, k] = qk_norm_rotate(in);
    (q.sum() + k.sum()).backward();
    const ExpectedGradients of_q = scalar_qk_norm_gradients(in, in.rotary.q, in.q_weight, at::ones_like(in.rotary.q));
    const ExpectedGradients of_k = scalar_qk_norm_gradients(in, in.rotary.k, in.k_weight, at::ones_like(in.rotary.k));
    expect_within(in.rotary.q.grad(), of_q.input);
    expect_within(in.q_weight.grad(), of_q.weight);
    expect_within(in.rotary.k.grad(), of_k.input);
    expect_within(in.k_weight.grad(), of_k.weight);
  }
}

TEST_P(QKNormRotaryEmbeddingGraph, DifferentiableGradientsHaveTheValuesOfTheKernels) {
  for (const at::ScalarType dtype : {at::kHalf, at::kFloat, at::kDouble}) {
    const QKNormInputs in = with_leaves(inputs(dtype), /*tables=*/false);
    const auto [q, k] = qk_norm_rotate(in);
    const TensorList arguments{in.rotary.q, in.rotary.k, in.q_weight, in.k_weight};
    const at::Tensor grad_q = random_like(q);
    const at::Tensor grad_k = random_like(k);
    const TensorList found = gradients({q, k}, arguments, {grad_q, grad_k}, /*create_graph=*/true);
    const ExpectedGradients of_q = scalar_qk_norm_gradients(in, in.rotary.q, in.q_weight, grad_q);
    const ExpectedGradients of_k = scalar_qk_norm_gradients(in, in.rotary.k, in.k_weight, grad_k);
    expect_within(found[0], of_q.input);
    expect_within(found[1], of_k.input);
    expect_within(found[2], of_q.weight);
    expect_within(found[3], of_k.weight);
    for (const at::Tensor& gradient : found) {
      EXPECT_TRUE(gradient.requires_grad());
    }
  }
}

TEST_P(QKNormRotaryEmbeddingGraph, RetainedGraphGivesTheGradientTwice) {
  const QKNormInputs in = with_leaves(inputs());
  const auto [q, k] = qk_norm_rotate(in);
  const at::Tensor sum = q.sum() + k.sum();
  sum.backward({}, /*retain_graph=*/true);
  const at::Tensor once = in.rotary.q.grad().clone();
  const at::Tensor once_weight = in.q_weight.grad().clone();
  sum.backward();
  expect_same_bits(in.rotary.q.grad(), once * 2);
  expect_same_bits(in.q_weight.grad(), once_weight * 2);
}

TEST_P(QKNormRotaryEmbeddingGraph, SecondBackwardThroughAFreedGraphIsAnError) {
  const QKNormInputs in = with_leaves(inputs());
  const auto [q, k] = qk_norm_rotate(in);
  const at::Tensor sum = q.sum() + k.sum();
  sum.backward();
  expect_error([&] { sum.backward(); }, {"backward through the graph a second time"});
}

TEST_P(QKNormRotaryEmbeddingGraph, ArgumentsChangedInPlaceBeforeBackwardAreAnError) {
  for (size_t i = 0; i < 6; ++i) {
    SCOPED_TRACE(i);
    const QKNormInputs in = with_leaves(inputs());
    const TensorList arguments = arguments_of(in);
    const TensorList outputs = function_of(in)(arguments);
    const at::Tensor sum = outputs[0].sum() + outputs[1].sum();
    {
      const at::NoGradGuard no_grad;
      const at::Tensor& argument = arguments[i];
      argument.mul_(2);
    }
    expect_error([&] { sum.backward(); }, {"modified by an inplace operation"});
  }
}

TEST_P(QKNormRotaryEmbeddingGraph, InferenceModeAndNoGradModeRecordNothing) {
  {
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(std::get<0>(qk_norm_rotate(with_leaves(inputs()))).requires_grad());
  }
  const c10::InferenceMode inference;
  const QKNormInputs in = inputs();
  const auto [q, k] = qk_norm_rotate(in);
  EXPECT_TRUE(q.is_inference());
  expect_within(q, scalar_qk_norm(in, in.rotary.q, in.q_weight));
}

TEST_P(QKNormRotaryEmbeddingGraph, ForwardModeTangentsAreAnError) {
  const QKNormInputs in = inputs();
  const auto level = static_cast<int64_t>(torch::autograd::forward_ad::enter_dual_level());
  QKNormInputs dual = in;
  dual.rotary.q = at::_make_dual(in.rotary.q, at::ones_like(in.rotary.q), level);
  expect_error([&] { qk_norm_rotate(dual); }, {"posenc::qk_norm_rotary_embedding", "forward-mode tangents"});
  dual = QKNormInputs();
  torch::autograd::forward_ad::exit_dual_level(static_cast<uint64_t>(level));
}

TEST_P(QKNormRotaryEmbeddingGraph, DeterministicAlgorithmsAreNoErrorAndNoElementIsLeftUnwritten) {
  for (const RotaryCase& c : small_cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    const QKNormInputs in = with_leaves(make_qk_norm_inputs(c, {GetParam(), at::kFloat}));
    const auto run = [&] {
      TensorList results = function_of(in)(arguments_of(in));
      const TensorList found =
          gradients(results, arguments_of(in), {at::ones_like(results[0]), at::ones_like(results[1])});
      results.insert(results.end(), found.begin(), found.end());
      return results;
    };
    const TensorList expected = run();
    const DeterministicAlgorithms deterministic;
    const TensorList found = run();
    for (size_t i = 0; i < expected.size(); ++i) {
      expect_same_bits(found[i], expected[i]);
      EXPECT_FALSE(found[i].isnan().any().item<bool>());
    }
  }
}

TEST(QKNormRotaryEmbeddingThreads, GradientsOfWeightsDoNotDependOnTheirNumber) {
  RotaryCase c;
  c.tokens = 600;
  c.head_dim = c.rotary_dim = 64;
  const QKNormInputs in = with_leaves(make_qk_norm_inputs(c, {at::kCPU, at::kFloat}), /*tables=*/false);
  const auto run = [&] {
    const auto [q, k] = qk_norm_rotate(in);
    return gradients({q, k}, {in.q_weight, in.k_weight}, {at::ones_like(q), at::ones_like(k)});
  };
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const TensorList one = run();
  at::set_num_threads(3);
  const TensorList three = run();
  at::set_num_threads(before);
  expect_same_bits(three[0], one[0]);
  expect_same_bits(three[1], one[1]);
}

// ---------------------------------------------------------------------------------------------------------------------
// The dispatcher

TEST(QKNormRotaryEmbeddingDispatcher, SchemasAreThePublicOnes) {
  const auto schema = [](const char* name) {
    return c10::str(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").schema());
  };
  EXPECT_EQ(
      schema("posenc::qk_norm_rotary_embedding"),
      "posenc::qk_norm_rotary_embedding(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
      "Tensor? positions=None, *, float eps=9.9999999999999995e-07, bool unit_offset=False, bool interleaved=False, "
      "bool conjugate=False, int[] pair_axes=[]) -> (Tensor, Tensor)");
}

TEST(QKNormRotaryEmbeddingDispatcher, EveryOperatorHasItsKernels) {
  for (const char* name : {"posenc::qk_norm_rotary_embedding", "posenc::qk_norm_rotary_embedding_backward"}) {
    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    EXPECT_TRUE(op.hasKernelForDispatchKey(c10::DispatchKey::CPU));
    EXPECT_TRUE(op.hasKernelForDispatchKey(c10::DispatchKey::Meta));
    EXPECT_EQ(op.hasKernelForDispatchKey(c10::DispatchKey::CUDA), kBuiltWithCuda);
  }
}

TEST(QKNormRotaryEmbeddingMeta, ResultsAndGradientsHaveTheShapesDtypesAndStridesOfTheCpu) {
  for (int strides = 0; strides < kStrides; ++strides) {
    RotaryCase c;
    c.q_strides = c.k_strides = static_cast<Strides>(strides);
    SCOPED_TRACE(::testing::Message() << c);
    const auto run = [&c](at::DeviceType device) {
      const QKNormInputs in = with_leaves(make_qk_norm_inputs(c, {device, at::kBFloat16}, false, /*wide=*/true));
      TensorList results = function_of(in)(arguments_of(in));
      const TensorList found =
          gradients(results, arguments_of(in), {at::empty_like(results[0]), at::empty_like(results[1])});
      results.insert(results.end(), found.begin(), found.end());
      return results;
    };
    const TensorList on_cpu = run(at::kCPU);
    const TensorList on_meta = run(at::kMeta);
    for (size_t i = 0; i < on_cpu.size(); ++i) {
      EXPECT_TRUE(on_meta[i].is_meta());
      EXPECT_EQ(on_meta[i].sizes(), on_cpu[i].sizes());
      EXPECT_EQ(on_meta[i].strides(), on_cpu[i].strides());
      EXPECT_EQ(on_meta[i].scalar_type(), on_cpu[i].scalar_type());
    }
  }
}

}  // namespace
}  // namespace posenc::test
