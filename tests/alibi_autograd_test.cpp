#include "alibi_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

namespace posenc::test {
namespace {

/// Tolerance of slope gradients, relative to the sum of their absolute terms: rounding of the terms, but not of sums.
constexpr double kSlopeTolerance = 1e-6;

class AlibiAutograd : public TargetTest {
 protected:
  /// Arguments with scores and slopes that require grad as given.
  AlibiInputs leaves(const AlibiCase& c = AlibiCase(), bool scores = true, bool slopes = true) const {
    return with_alibi_grad(make_alibi_inputs(c, GetParam()), scores, slopes);
  }
  at::Tensor random(at::IntArrayRef sizes, Strides strides = Strides::dense) const {
    return random_tensor(sizes, GetParam(), strides);
  }
  /// Positive numbers, so that the terms of a sum do not cancel.
  at::Tensor positive(at::IntArrayRef sizes) const {
    return (at::rand(sizes, at::kDouble) + 0.5).to(device(), dtype());
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAutograd, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAutograd, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(AlibiAutograd, GradientToScoresIsTheIncomingGradientItself) {
  for (const bool learnable : {false, true}) {
    for (const Strides strides : {Strides::dense, Strides::head_major, Strides::reversed, Strides::one_value}) {
      const AlibiInputs in = leaves(AlibiCase(), true, learnable);
      const at::Tensor grad = random(in.scores.sizes(), strides);
      const at::Tensor found = gradients({add_of(in)}, {in.scores}, {grad})[0];
      EXPECT_TRUE(found.is_alias_of(grad));
      EXPECT_EQ(found.data_ptr(), grad.data_ptr());
      EXPECT_EQ(found.strides(), grad.strides());
      expect_same_bits(found, grad);
    }
  }
}

TEST_P(AlibiAutograd, CausalGradientToScoresIsZeroWhereHidden) {
  for (const auto& [queries, keys] : std::vector<std::pair<int64_t, int64_t>>{{5, 7}, {16, 16}, {7, 3}}) {
    for (const Strides strides : {Strides::dense, Strides::head_major, Strides::one_value}) {
      AlibiCase c;
      c.causal = true;
      c.q_len = queries;
      c.k_len = keys;
      const AlibiInputs in = leaves(c);
      const at::Tensor grad = random(in.scores.sizes(), strides);
      const at::Tensor found = gradients({add_of(in)}, {in.scores}, {grad})[0];
      const at::Tensor hidden = scalar_bias(in).isinf();
      expect_same_bits(found, grad.cpu().masked_fill(hidden, 0));
    }
  }
}

TEST_P(AlibiAutograd, HiddenGradientsMayBeAnything) {
  AlibiCase c;
  c.causal = true;
  const AlibiInputs in = leaves(c);
  const at::Tensor hidden = scalar_bias(in).isinf();
  const at::Tensor grad = random(in.scores.sizes());
  const at::Tensor spoilt = grad.masked_fill(hidden.to(device()), std::nan(""));
  const TensorList expected = gradients({add_of(in)}, {in.scores, in.slopes}, {grad});
  const TensorList found = gradients({add_of(in)}, {in.scores, in.slopes}, {spoilt});
  expect_same_bits(found[0], expected[0]);
  expect_same_bits(found[1], expected[1]);
}

TEST_P(AlibiAutograd, SlopeGradientOfTheBiasMatchesTheScalarLoop) {
  for (AlibiCase c : small_alibi_cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    c.batched = false;
    AlibiInputs in = leaves(c, false);
    in.key_padding_mask.reset();
    for (int strides = 0; strides < kStrides; ++strides) {
      const at::Tensor grad = random(in.scores.sizes(), static_cast<Strides>(strides));
      const at::Tensor found = gradients({bias_of(in, dtype())}, {in.slopes}, {grad})[0];
      EXPECT_EQ(found.scalar_type(), at::kFloat);
      EXPECT_EQ(found.sizes(), in.slopes.sizes());
      expect_slope_gradient(found, scalar_add_gradients(in, grad), kSlopeTolerance);
    }
  }
}

TEST_P(AlibiAutograd, SlopeGradientOfTheSumMatchesTheScalarLoop) {
  for (AlibiCase c : small_alibi_cases()) {
    for (const int64_t keys : {c.k_len, int64_t{16}, int64_t{67}}) {
      SCOPED_TRACE(::testing::Message() << c << ", keys " << keys);
      c.k_len = keys;
      AlibiInputs in = leaves(c, false);
      in.key_padding_mask.reset();
      for (int strides = 0; strides < kStrides; ++strides) {
        const at::Tensor grad = random(in.scores.sizes(), static_cast<Strides>(strides));
        const at::Tensor found = gradients({add_of(in)}, {in.slopes}, {grad})[0];
        EXPECT_EQ(found.scalar_type(), at::kFloat);
        expect_slope_gradient(found, scalar_add_gradients(in, grad), kSlopeTolerance);
      }
    }
  }
}

TEST_P(AlibiAutograd, SoftmaxGradientsMatchTheScalarLoop) {
  for (AlibiCase c : small_alibi_cases()) {
    for (const int64_t keys : {c.k_len, int64_t{16}, int64_t{67}}) {
      SCOPED_TRACE(::testing::Message() << c << ", keys " << keys);
      c.k_len = keys;
      for (const auto& [scores, slopes] : {std::pair(true, true), std::pair(true, false), std::pair(false, true)}) {
        const AlibiInputs in = leaves(c, scores, slopes);
        const at::Tensor grad = random(in.scores.sizes());
        const TensorList found = gradients({softmax_of(in)}, {in.scores, in.slopes}, {grad});
        expect_softmax_gradients(found[0], found[1], in, grad);
      }
    }
  }
}

TEST_P(AlibiAutograd, SoftmaxTakesGradientsOfAnyStrides) {
  for (const int64_t keys : {7, 16}) {
    for (int strides = 0; strides < kStrides; ++strides) {
      SCOPED_TRACE(strides);
      AlibiCase c;
      c.k_len = keys;
      c.causal = true;
      const AlibiInputs in = leaves(c);
      const at::Tensor grad = random(in.scores.sizes(), static_cast<Strides>(strides));
      const TensorList found = gradients({softmax_of(in)}, {in.scores, in.slopes}, {grad});
      expect_softmax_gradients(found[0], found[1], in, grad);
    }
  }
}

TEST_P(AlibiAutograd, SoftmaxGradientsOfAnyRowLength) {
  for (const int64_t keys : {1, 7, 8, 9, 1023, 1024, 1025, 2048, 16384, 16385, 40000}) {
    for (const bool flags : {false, true}) {
      SCOPED_TRACE(::testing::Message() << keys << (flags ? " keys, all flags" : " keys"));
      AlibiCase c;
      c.batch = 1;
      c.heads = 2;
      c.q_len = 2;
      c.k_len = keys;
      AlibiInputs in = make_alibi_inputs(c, GetParam());
      in.slopes = at::tensor({0x1p-12F, 0.5F}).to(device());
      if (flags) {
        in.scale = 0.125;
        in.causal = true;
        in.key_padding_mask = random_mask(1, keys, GetParam().device);
        in.query_offset = keys - 3;
      }
      in = with_alibi_grad(in, true, true);
      const at::Tensor grad = random(in.scores.sizes());
      const TensorList found = gradients({softmax_of(in)}, {in.scores, in.slopes}, {grad});
      expect_softmax_gradients(found[0], found[1], in, grad);
    }
  }
}

TEST_P(AlibiAutograd, RowsWithNothingVisibleHaveZeroGradients) {
  for (const int64_t keys : {5, 64, 2048, 17000}) {
    SCOPED_TRACE(keys);
    AlibiCase c;
    c.heads = 2;
    c.q_len = 3;
    c.k_len = keys;
    AlibiInputs in = leaves(c);
    in.key_padding_mask = at::zeros({c.batch, keys}, at::kBool).to(device());
    in.key_padding_mask->select(0, 1).fill_(true);
    in.causal = true;
    in.query_offset = -1;
    const at::Tensor grad = random(in.scores.sizes());
    const TensorList found = gradients({softmax_of(in)}, {in.scores, in.slopes}, {grad});
    EXPECT_EQ(found[0].select(0, 1).to(at::kDouble).abs().max().item<double>(), 0);
    EXPECT_EQ(found[0].select(-2, 0).to(at::kDouble).abs().max().item<double>(), 0);
    EXPECT_FALSE(found[1].isnan().any().item<bool>());
    expect_softmax_gradients(found[0], found[1], in, grad);
  }
}

TEST_P(AlibiAutograd, AllMaskedKeysGiveZeroGradients) {
  AlibiInputs in = leaves();
  in.key_padding_mask = at::ones({2, 7}, at::kBool).to(device());
  const at::Tensor grad = random(in.scores.sizes());
  for (const at::Tensor& found : gradients({softmax_of(in)}, {in.scores, in.slopes}, {grad})) {
    EXPECT_EQ(found.to(at::kDouble).abs().max().item<double>(), 0);
  }
}

TEST_P(AlibiAutograd, SlopeGradientsOfLongSequencesAreThoseOfFloat64) {
  AlibiCase c;
  c.batched = false;
  c.heads = 1;
  c.q_len = 160;
  c.k_len = 16384;
  const AlibiInputs in = leaves(c);
  const at::Tensor grad = positive(in.scores.sizes());
  const AlibiGradients expected = scalar_add_gradients(in, grad);
  const double bound = 1e-5 * expected.slopes.abs().max().item<double>();
  const at::Tensor of_bias = gradients({bias_of(in, dtype())}, {in.slopes}, {grad})[0];
  const at::Tensor of_sum = gradients({add_of(in)}, {in.slopes}, {grad})[0];
  EXPECT_NEAR(of_bias.item<double>(), expected.slopes.item<double>(), bound);
  EXPECT_NEAR(of_sum.item<double>(), expected.slopes.item<double>(), bound);
}

TEST_P(AlibiAutograd, SlopeGradientOfALongSoftmaxIsThatOfFloat64) {
  AlibiCase c;
  c.batched = false;
  c.heads = 1;
  c.q_len = 160;
  c.k_len = 16384;
  AlibiInputs in = make_alibi_inputs(c, GetParam());
  in.slopes = at::tensor({0x1p-11F}).to(device());
  in = with_alibi_grad(in, false, true);
  // Proportional to the distance, so that the terms do not cancel.
  const at::Tensor grad = (scalar_distances(c.q_len, c.k_len) / 4096).unsqueeze(0).to(device(), dtype());
  const AlibiGradients expected = scalar_softmax_gradients(in, grad);
  const at::Tensor found = gradients({softmax_of(in)}, {in.slopes}, {grad})[0];
  // Saved probabilities have 11 significant bits in half and 8 in bfloat16.
  const double relative = dtype() == at::kHalf || dtype() == at::kBFloat16 ? 1e-2 : 1e-5;
  EXPECT_NEAR(found.item<double>(), expected.slopes.item<double>(), relative * expected.slopes.abs().item<double>());
}

TEST_P(AlibiAutograd, GradientOfASumMatchesTheScalarLoop) {
  for (const bool causal : {false, true}) {
    AlibiCase c;
    c.causal = causal;
    c.k_len = 16;
    const AlibiInputs in = leaves(c);
    const at::Tensor ones = at::ones({c.heads, c.q_len, c.k_len});
    bias_of(in, dtype()).sum().backward();
    AlibiInputs of_bias = in;
    of_bias.scores = in.scores.detach().select(0, 0);
    expect_slope_gradient(in.slopes.grad(), scalar_add_gradients(of_bias, ones), kSlopeTolerance);
    in.slopes.mutable_grad().reset();

    add_of(in).sum().backward();
    const at::Tensor batch = at::ones_like(in.scores).detach();
    const AlibiGradients expected = scalar_add_gradients(in, batch);
    expect_slope_gradient(in.slopes.grad(), expected, kSlopeTolerance);
    expect_same_bits(in.scores.grad(), expected.scores.to(dtype()));
    in.slopes.mutable_grad().reset();
    in.scores.mutable_grad().reset();

    softmax_of(in).sum().backward();
    expect_softmax_gradients(in.scores.grad(), in.slopes.grad(), in, batch);
  }
}

TEST_P(AlibiAutograd, GradientsAreTheSameBitsEachTime) {
  AlibiCase c;
  c.heads = 5;
  c.q_len = 67;
  c.k_len = 1030;
  const AlibiInputs in = leaves(c);
  const at::Tensor grad = random(in.scores.sizes());
  const auto run = [&]() -> TensorList {
    return {
        gradients({bias_of(in, dtype())}, {in.slopes}, {grad.select(0, 0)})[0],
        gradients({add_of(in)}, {in.slopes}, {grad})[0], gradients({softmax_of(in)}, {in.slopes}, {grad})[0],
        gradients({softmax_of(in)}, {in.scores}, {grad})[0]};
  };
  const TensorList expected = run();
  for (int i = 0; i < 3; ++i) {
    const TensorList found = run();
    for (size_t j = 0; j < found.size(); ++j) {
      expect_same_bits(found[j], expected[j]);
    }
  }
}

TEST_P(AlibiAutograd, OnlyWhatIsNeededRequiresGrad) {
  const AlibiInputs none = leaves(AlibiCase(), false, false);
  EXPECT_FALSE(bias_of(none, dtype()).requires_grad());
  EXPECT_FALSE(add_of(none).requires_grad());
  EXPECT_FALSE(softmax_of(none).requires_grad());
  const AlibiInputs slopes = leaves(AlibiCase(), false, true);
  for (const at::Tensor& y : {bias_of(slopes, dtype()), add_of(slopes), softmax_of(slopes)}) {
    y.sum().backward();
    EXPECT_TRUE(slopes.slopes.grad().defined());
    EXPECT_FALSE(slopes.scores.grad().defined());
    slopes.slopes.mutable_grad().reset();
  }
  const AlibiInputs scores = leaves(AlibiCase(), true, false);
  for (const at::Tensor& y : {add_of(scores), softmax_of(scores)}) {
    y.sum().backward();
    EXPECT_TRUE(scores.scores.grad().defined());
    EXPECT_FALSE(scores.slopes.grad().defined());
    scores.scores.mutable_grad().reset();
  }
}

TEST_P(AlibiAutograd, NothingIsRecordedWhereGradModeIsOff) {
  const AlibiInputs in = leaves();
  {
    const at::NoGradGuard no_grad;
    EXPECT_FALSE(add_of(in).requires_grad());
    EXPECT_FALSE(softmax_of(in).requires_grad());
    EXPECT_FALSE(bias_of(in, dtype()).requires_grad());
  }
  const c10::InferenceMode inference;
  EXPECT_TRUE(add_of(in).is_inference());
  expect_softmax(softmax_of(in), in);
}

TEST_P(AlibiAutograd, EmptyTensorsHaveGradients) {
  const auto expect_zeros = [](const at::Tensor& found) { EXPECT_TRUE(found.eq(0).all().item<bool>()) << found; };
  for (const int empty : {0, 1, 2, 3}) {
    AlibiCase c;
    c.batch = empty == 0 ? 0 : c.batch;
    c.heads = empty == 1 ? 0 : c.heads;
    c.q_len = empty == 2 ? 0 : c.q_len;
    c.k_len = empty == 3 ? 0 : c.k_len;
    SCOPED_TRACE(::testing::Message() << c);
    const AlibiInputs in = leaves(c);
    for (const at::Tensor& y : {add_of(in), softmax_of(in)}) {
      const TensorList found = gradients({y}, {in.scores, in.slopes}, {at::zeros_like(y)});
      EXPECT_EQ(found[0].sizes(), in.scores.sizes());
      EXPECT_EQ(found[1].sizes(), in.slopes.sizes());
      expect_zeros(found[1]);
    }
    if (empty != 0) {
      const at::Tensor y = bias_of(in, dtype());
      expect_zeros(gradients({y}, {in.slopes}, {at::zeros_like(y)})[0]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// In place

TEST_P(AlibiAutograd, InPlaceHasTheGradientsOfTheSum) {
  for (const bool causal : {false, true}) {
    AlibiCase c;
    c.causal = causal;
    const AlibiInputs in = leaves(c);
    const at::Tensor grad = random(in.scores.sizes());
    const TensorList expected = gradients({add_of(in)}, {in.scores, in.slopes}, {grad});
    at::Tensor y = in.scores.clone();
    posenc::alibi_add_(y, in.slopes, in.causal, in.query_offset);
    const TensorList found = gradients({y}, {in.scores, in.slopes}, {grad});
    expect_same_bits(found[0], expected[0]);
    expect_same_bits(found[1], expected[1]);
  }
}

TEST_P(AlibiAutograd, InPlaceOnATensorWithoutHistoryRecordsTheSlopes) {
  const AlibiInputs in = leaves(AlibiCase(), false, true);
  const at::Tensor grad = random(in.scores.sizes());
  at::Tensor y = in.scores.clone();
  posenc::alibi_add_(y, in.slopes);
  ASSERT_TRUE(y.requires_grad());
  const at::Tensor found = gradients({y}, {in.slopes}, {grad})[0];
  expect_slope_gradient(found, scalar_add_gradients(in, grad), kSlopeTolerance);
}

TEST_P(AlibiAutograd, InPlaceOnAViewReachesItsBase) {
  const AlibiInputs in = leaves();
  const at::Tensor grad = random(in.scores.sizes());
  const at::Tensor base = in.scores.clone();
  at::Tensor part = base.narrow(0, 1, 1);
  posenc::alibi_add_(part, in.slopes);
  const TensorList found = gradients({base}, {in.scores, in.slopes}, {grad});
  expect_same_bits(found[0], grad);
  AlibiInputs of_part = in;
  of_part.scores = in.scores.detach().narrow(0, 1, 1);
  expect_slope_gradient(found[1], scalar_add_gradients(of_part, grad.narrow(0, 1, 1)), kSlopeTolerance);
}

TEST_P(AlibiAutograd, InPlaceOnALeafIsAnError) {
  AlibiInputs in = leaves();
  expect_error([&] { posenc::alibi_add_(in.scores, in.slopes); }, {"leaf"});
  at::Tensor view = in.scores.narrow(0, 0, 1);
  expect_error([&] { posenc::alibi_add_(view, in.slopes); }, {"leaf"});
  const at::NoGradGuard no_grad;
  EXPECT_NO_THROW(posenc::alibi_add_(in.scores, in.slopes));
}

TEST_P(AlibiAutograd, InPlaceOnWhatAnotherNodeNeedsIsAnErrorInBackward) {
  const AlibiInputs in = leaves();
  at::Tensor y = in.scores.exp();  // the backward pass of exp reads y
  posenc::alibi_add_(y, in.slopes);
  expect_error([&] { y.sum().backward(); }, {"modified by an inplace operation"});
}

}  // namespace
}  // namespace posenc::test
