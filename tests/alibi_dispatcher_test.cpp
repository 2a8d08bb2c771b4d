#include "alibi_support.h"
#include "gradcheck.h"

#include <posenc/reference.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace posenc::test {
namespace {

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

/// Calls an operator boxed, as TorchScript and Python do.
at::Tensor call_boxed(const char* name, std::vector<c10::IValue> stack) {
  find(name).callBoxed(stack);
  return stack.at(0).toTensor();
}

// ---------------------------------------------------------------------------------------------------------------------
// The dispatcher

TEST(AlibiDispatcher, SchemasAreThePublicOnes) {
  const auto schema = [](const char* name) { return c10::str(find(name).schema()); };
  EXPECT_EQ(schema("posenc::alibi_slopes"), "posenc::alibi_slopes(int num_heads, float max_bias=8.) -> Tensor");
  EXPECT_EQ(
      schema("posenc::alibi_bias"),
      "posenc::alibi_bias(Tensor slopes, SymInt q_len, SymInt k_len, *, bool causal=False, ScalarType dtype=6, "
      "SymInt? query_offset=None) -> Tensor");
  EXPECT_EQ(
      schema("posenc::alibi_add"),
      "posenc::alibi_add(Tensor scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> Tensor");
  EXPECT_EQ(
      schema("posenc::alibi_add_"),
      "posenc::alibi_add_(Tensor(a!) scores, Tensor slopes, *, bool causal=False, SymInt? query_offset=None) -> ()");
  EXPECT_EQ(
      schema("posenc::alibi_softmax"),
      "posenc::alibi_softmax(Tensor scores, Tensor slopes, *, float scale=1., bool causal=False, "
      "Tensor? key_padding_mask=None, SymInt? query_offset=None) -> Tensor");
}

TEST(AlibiDispatcher, EveryOperatorHasItsKernels) {
  for (const char* name :
       {"posenc::alibi_bias", "posenc::alibi_add", "posenc::alibi_add_", "posenc::alibi_mask", "posenc::alibi_softmax",
        "posenc::alibi_softmax_backward", "posenc::alibi_slopes_backward"}) {
    SCOPED_TRACE(name);
    EXPECT_TRUE(find(name).hasKernelForDispatchKey(c10::DispatchKey::CPU));
    EXPECT_TRUE(find(name).hasKernelForDispatchKey(c10::DispatchKey::Meta));
    EXPECT_EQ(find(name).hasKernelForDispatchKey(c10::DispatchKey::CUDA), kBuiltWithCuda);
  }
}

TEST(AlibiDispatcher, CallsByNameEqualTheFreeFunctions) {
  AlibiCase c;
  c.causal = c.masked = true;
  c.scale = 0.5;
  c.query_offset = 1;
  const AlibiInputs in = make_alibi_inputs(c, {at::kCPU, at::kFloat});
  expect_same_bits(call_boxed("posenc::alibi_slopes", {12, 8.0}), posenc::alibi_slopes(12));
  expect_same_bits(
      call_boxed("posenc::alibi_bias", {in.slopes, c.q_len, c.k_len, true, at::kHalf, in.query_offset}),
      bias_of(in, at::kHalf));
  expect_same_bits(call_boxed("posenc::alibi_add", {in.scores, in.slopes, true, in.query_offset}), add_of(in));
  expect_same_bits(
      call_boxed("posenc::alibi_softmax", {in.scores, in.slopes, 0.5, true, in.key_padding_mask, in.query_offset}),
      softmax_of(in));
  const at::Tensor expected = add_of(in);
  torch::jit::Stack stack{in.scores, in.slopes, true, in.query_offset};
  find("posenc::alibi_add_").callBoxed(stack);
  EXPECT_TRUE(stack.empty());
  expect_same_bits(in.scores, expected);
}

TEST(AlibiDispatcher, CallByNameIsDifferentiable) {
  AlibiInputs in = with_alibi_grad(make_alibi_inputs(AlibiCase(), {at::kCPU, at::kFloat}), true, true);
  const at::Tensor y = call_boxed("posenc::alibi_add", {in.scores, in.slopes, false, std::optional<int64_t>()});
  const at::Tensor grad = at::randn(y.sizes());
  const TensorList found = gradients({y}, {in.scores, in.slopes}, {grad});
  expect_same_bits(found[0], grad);
  expect_slope_gradient(found[1], scalar_add_gradients(in, grad), 1e-6);
}

// ---------------------------------------------------------------------------------------------------------------------
// Meta

TEST(AlibiMeta, ResultsHaveTheShapeDtypeAndStridesOfTheCpu) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    for (int strides = 0; strides < kStrides; ++strides) {
      AlibiCase c;
      c.strides = static_cast<Strides>(strides);
      c.masked = true;
      SCOPED_TRACE(::testing::Message() << dtype << ", " << c);
      const AlibiInputs on_cpu = make_alibi_inputs(c, {at::kCPU, dtype});
      const AlibiInputs on_meta = make_alibi_inputs(c, {at::kMeta, dtype});
      for (const auto& [meta, cpu] :
           {std::pair(add_of(on_meta), add_of(on_cpu)), std::pair(softmax_of(on_meta), softmax_of(on_cpu)),
            std::pair(bias_of(on_meta, dtype), bias_of(on_cpu, dtype))}) {
        EXPECT_TRUE(meta.is_meta());
        EXPECT_EQ(meta.sizes(), cpu.sizes());
        EXPECT_EQ(meta.strides(), cpu.strides());
        EXPECT_EQ(meta.scalar_type(), cpu.scalar_type());
      }
    }
  }
}

/// All results of an operator called by name.
TensorList results_of(const char* name, std::vector<c10::IValue> stack) {
  find(name).callBoxed(stack);
  TensorList results;
  for (const c10::IValue& value : stack) {
    results.push_back(value.toTensor());
  }
  return results;
}

/// Results of all operators for `scores`, which also serve as probabilities and gradients.
TensorList all_results(const at::Tensor& scores) {
  const at::Tensor slopes = at::ones({scores.size(-3)}, scores.options().dtype(at::kFloat));
  const std::optional<int64_t> offset(1);
  TensorList results{scores};
  const auto add = [&results](const TensorList& more) { results.insert(results.end(), more.begin(), more.end()); };
  add(results_of("posenc::alibi_bias", {slopes, scores.size(-2), scores.size(-1), true, scores.scalar_type(), offset}));
  add(results_of("posenc::alibi_add", {scores, slopes, true, offset}));
  add(results_of("posenc::alibi_mask", {scores, offset}));
  add(results_of("posenc::alibi_slopes_backward", {scores, true, offset}));
  add(results_of("posenc::alibi_softmax", {scores, slopes, 0.5, true, std::optional<at::Tensor>(), offset}));
  for (const bool slopes_grad : {false, true}) {
    add(results_of("posenc::alibi_softmax_backward", {scores, scores, 0.5, true, offset, slopes_grad}));
  }
  return results;
}

TEST(AlibiMeta, AllResultsHaveTheLayoutOfTheCpuWhateverTheMemory) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{2, 3, 5, 7}, {3, 5, 7}, {1, 3, 1, 7}}) {
      std::vector<int64_t> order(sizes.size());
      std::iota(order.begin(), order.end(), 0);
      do {
        // Strides of a dense tensor with the dimensions in `order`, outermost first.
        std::vector<int64_t> strides(sizes.size());
        int64_t stride = 1;
        for (size_t i = order.size(); i-- > 0;) {
          strides[static_cast<size_t>(order[i])] = stride;
          stride *= sizes[static_cast<size_t>(order[i])];
        }
        SCOPED_TRACE(::testing::Message() << dtype << " " << at::IntArrayRef(sizes) << " " << at::IntArrayRef(strides));
        const auto on = [&](at::DeviceType device) {
          return all_results(at::empty_strided(sizes, strides, at::device(device).dtype(dtype)).zero_());
        };
        const TensorList cpu = on(at::kCPU);
        const TensorList meta = on(at::kMeta);
        ASSERT_EQ(meta.size(), cpu.size());
        for (size_t i = 0; i < cpu.size(); ++i) {
          SCOPED_TRACE(i);
          ASSERT_EQ(meta[i].defined(), cpu[i].defined());
          if (cpu[i].defined()) {
            EXPECT_TRUE(meta[i].is_meta());
            EXPECT_EQ(meta[i].sizes(), cpu[i].sizes());
            EXPECT_EQ(meta[i].strides(), cpu[i].strides());
            EXPECT_EQ(meta[i].scalar_type(), cpu[i].scalar_type());
          }
        }
      } while (std::next_permutation(order.begin(), order.end()));
    }
  }
}

TEST(AlibiMeta, SizesBeyondAnyMemoryWork) {
  const at::Tensor slopes = at::empty({64}, at::kMeta);
  EXPECT_EQ(posenc::alibi_bias(slopes, 1'000'000, 1'000'000).sizes(), at::IntArrayRef({64, 1'000'000, 1'000'000}));
}

TEST(AlibiMeta, InPlaceReturnsItsArgument) {
  AlibiInputs in = make_alibi_inputs(AlibiCase(), {at::kMeta, at::kFloat});
  EXPECT_TRUE(posenc::alibi_add_(in.scores, in.slopes).is_same(in.scores));
}

TEST(AlibiMeta, GradientsHaveTheShapesOfTheirInputs) {
  for (const bool causal : {false, true}) {
    AlibiCase c;
    c.causal = causal;
    const AlibiInputs in = with_alibi_grad(make_alibi_inputs(c, {at::kMeta, at::kHalf}), true, true);
    for (const at::Tensor& y : {add_of(in), softmax_of(in)}) {
      const TensorList found = gradients({y}, {in.scores, in.slopes}, {at::empty_like(y)});
      EXPECT_EQ(found[0].sizes(), in.scores.sizes());
      EXPECT_EQ(found[0].scalar_type(), at::kHalf);
      EXPECT_TRUE(found[0].is_meta());
      EXPECT_EQ(found[1].sizes(), in.slopes.sizes());
      EXPECT_EQ(found[1].scalar_type(), at::kFloat);
      EXPECT_TRUE(found[1].is_meta());
    }
    const at::Tensor y = bias_of(in, at::kHalf);
    EXPECT_EQ(gradients({y}, {in.slopes}, {at::empty_like(y)})[0].sizes(), in.slopes.sizes());
  }
}

TEST(AlibiMeta, BadArgumentsAreTheErrorsOfTheCpu) {
  const auto expect_same_error = [](const std::function<void(AlibiInputs&)>& spoil, const std::string& part) {
    for (const at::DeviceType device : {at::kCPU, at::kMeta}) {
      AlibiInputs in = make_alibi_inputs(AlibiCase(), {device, at::kFloat});
      spoil(in);
      expect_error([&] { softmax_of(in); }, {"posenc::alibi_softmax: ", part});
    }
  };
  expect_same_error([](AlibiInputs& in) { in.scores = in.scores[0][0]; }, "expected scores of shape");
  expect_same_error([](AlibiInputs& in) { in.slopes = in.slopes.narrow(0, 0, 2); }, "[H] = [3], got [2]");
  expect_same_error([](AlibiInputs& in) { in.slopes = in.slopes.to(at::kHalf); }, "slopes of dtype float32");
  expect_same_error(
      [](AlibiInputs& in) { in.key_padding_mask = at::empty({2, 6}, in.scores.options().dtype(at::kBool)); },
      "[B, Sk] = [2, 7]");
}

// ---------------------------------------------------------------------------------------------------------------------
// The reference versions against the scalar loop

class AlibiReference : public ::testing::TestWithParam<AlibiCase> {
 protected:
  AlibiInputs inputs(at::ScalarType dtype) const { return make_alibi_inputs(GetParam(), {at::kCPU, dtype}); }
  static at::Tensor reference_add(const AlibiInputs& in) {
    return posenc::reference::alibi_add(in.scores, in.slopes, in.causal, in.query_offset);
  }
  static at::Tensor reference_softmax(const AlibiInputs& in) {
    return posenc::reference::alibi_softmax(
        in.scores, in.slopes, in.scale, in.causal, in.key_padding_mask, in.query_offset);
  }
};

std::vector<AlibiCase> reference_cases() {
  std::vector<AlibiCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(AlibiCase&)>& change) {
    AlibiCase c;
    c.name = name;
    change(c);
    cases.push_back(c);
  };
  add("Plain", [](AlibiCase&) {});
  add("Causal", [](AlibiCase& c) { c.causal = true; });
  add("Masked", [](AlibiCase& c) { c.masked = true; });
  add("MoreQueries", [](AlibiCase& c) { c.q_len = 9, c.causal = true; });
  add("ThreeDimensions", [](AlibiCase& c) { c.batched = false, c.masked = c.causal = true; });
  add("AllFlags", [](AlibiCase& c) {
    c.causal = c.masked = true;
    c.scale = -0.5;
    c.query_offset = -1;
    c.strides = Strides::reversed;
  });
  return cases;
}

std::string case_name(const ::testing::TestParamInfo<AlibiCase>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiReference, ::testing::ValuesIn(reference_cases()), case_name);

TEST_P(AlibiReference, IsTheFormula) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}) {
    const AlibiInputs in = inputs(dtype);
    expect_bias(
        posenc::reference::alibi_bias(
            in.slopes, in.scores.size(-2), in.scores.size(-1), in.causal, dtype, in.query_offset),
        in, in.scores.size(-2), in.scores.size(-1));
    expect_sum(reference_add(in), in);
    expect_softmax(reference_softmax(in), in);
  }
}

TEST_P(AlibiReference, GradientsAreTheFormula) {
  const AlibiInputs in = with_alibi_grad(inputs(at::kDouble), true, true);
  const at::Tensor grad = at::randn(in.scores.sizes(), at::kDouble);
  const at::Tensor sum = reference_add(in);
  // Elements of minus infinity have a gradient of zero.
  const at::Tensor seen = sum.masked_fill(sum.detach().isinf(), 0);
  const TensorList of_sum = gradients({seen}, {in.scores, in.slopes}, {grad});
  const AlibiGradients expected = scalar_add_gradients(in, grad);
  if (!in.key_padding_mask) {
    expect_within(of_sum[0], expected.scores, at::full({}, 1e-14, at::kDouble));
    expect_slope_gradient(of_sum[1], expected, 1e-6);
  }
  const TensorList of_softmax = gradients({reference_softmax(in)}, {in.scores, in.slopes}, {grad});
  expect_softmax_gradients(of_softmax[0], of_softmax[1], in, grad);
}

TEST(AlibiScalarLoop, IsTheFormula) {
  AlibiInputs in;
  in.scores = at::zeros({1, 2, 3}, at::kDouble);
  in.slopes = at::tensor({1.0}, at::kDouble);
  // The queries are at the positions of keys 1 and 2.
  const double e = std::exp(-1.0);
  const double e2 = std::exp(-2.0);
  expect_within(
      scalar_softmax(in),
      at::tensor(
          {e / (1 + 2 * e), 1 / (1 + 2 * e), e / (1 + 2 * e), e2 / (1 + e + e2), e / (1 + e + e2), 1 / (1 + e + e2)},
          at::kDouble)
          .view({1, 2, 3}),
      at::full({}, 1e-15, at::kDouble));
  in.causal = true;
  in.query_offset = -1;
  expect_same_bits(scalar_softmax(in), at::tensor({0., 0., 0., 1., 0., 0.}, at::kDouble).view({1, 2, 3}));
}

}  // namespace
}  // namespace posenc::test
