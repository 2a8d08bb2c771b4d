#include "gradcheck.h"
#include "rotary_embedding_inplace_support.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace posenc::test {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The graph

class RotaryEmbeddingInPlaceGraph : public DeviceTest {
 protected:
  RotaryInputs inputs(at::ScalarType dtype = at::kFloat) const {
    return make_inputs(RotaryCase(), {GetParam(), dtype});
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingInPlaceGraph, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingInPlaceGraph, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryEmbeddingInPlaceGraph, DerivativesMatchCentralDifferences) {
  const RotaryInputs in = inputs(at::kDouble);
  const Differentiable pair = [&in](const TensorList& x) -> TensorList {
    at::Tensor q = x[0] * 1;
    at::Tensor k = x[1] * 1;
    rotate_in_place(in, q, k);
    return {q, k};
  };
  const TensorList leaves{in.q.detach().requires_grad_(), in.k.detach().requires_grad_()};
  gradcheck(pair, leaves);
  gradgradcheck(pair, leaves);
  const Differentiable views = [&in](const TensorList& x) -> TensorList {
    const at::Tensor packed = at::cat({x[0], x[1]}, 2);
    at::Tensor q = packed.narrow(2, 0, 4);
    at::Tensor k = packed.narrow(2, 4, 2);
    rotate_in_place(in, q, k);
    return {packed};
  };
  gradcheck(views, leaves);
  gradgradcheck(views, leaves);
}

TEST_P(RotaryEmbeddingInPlaceGraph, CountsVersions) {
  RotaryInputs in = inputs();
  const auto version = [](const at::Tensor& x) { return x._version(); };
  const auto q_before = version(in.q);
  const auto k_before = version(in.k);
  rotate_in_place(in, in.q);
  EXPECT_EQ(version(in.q), q_before + 1);
  rotate_in_place(in, in.q, in.k);
  EXPECT_EQ(version(in.q), q_before + 2);
  EXPECT_EQ(version(in.k), k_before + 1);
}

TEST_P(RotaryEmbeddingInPlaceGraph, ValuesThatOthersSavedAreStale) {
  RotaryInputs in = inputs();
  const at::Tensor leaf = in.q.detach().clone().requires_grad_();
  in.q = leaf.clone();
  const at::Tensor square = in.q * in.q;
  rotate_in_place(in, in.q);
  expect_error([&] { square.sum().backward(); }, {"modified by an inplace operation"});
}

TEST_P(RotaryEmbeddingInPlaceGraph, ItsOutputMayBeChangedAgain) {
  RotaryInputs in = inputs();
  const at::Tensor leaf = in.q.detach().clone().requires_grad_();
  in.q = leaf.clone();
  rotate_in_place(in, in.q);
  rotate_in_place(backwards(in), in.q);
  const at::Tensor grad = at::randn_like(leaf);
  expect_same_bits(gradients({in.q}, {leaf}, {grad})[0], rotate(backwards(in), rotate(in, grad)));
}

TEST_P(RotaryEmbeddingInPlaceGraph, LeavesThatRequireGradAreErrors) {
  RotaryInputs in = inputs();
  in.q.requires_grad_();
  expect_error([&] { rotate_in_place(in, in.q); }, {"posenc::rotary_embedding_: ", "expected x", "leaf"});
  expect_error([&] { rotate_in_place(in, in.q, in.k); }, {"posenc::rotary_embedding_qk_: ", "expected q", "leaf"});
  in.q = in.q.detach();
  in.k.requires_grad_();
  expect_error([&] { rotate_in_place(in, in.q, in.k); }, {"expected k", "leaf"});
  const at::Tensor before = in.k.detach().clone();
  {
    const at::NoGradGuard no_grad;
    rotate_in_place(in, in.q, in.k);
  }
  expect_same_bits(in.k, rotate(in, before));
}

TEST_P(RotaryEmbeddingInPlaceGraph, ViewsOfLeavesThatRequireGradAreErrors) {
  RotaryInputs in = inputs();
  const at::Tensor leaf = in.q.detach().clone().requires_grad_();
  at::Tensor view = leaf.view_as(leaf);
  expect_error([&] { rotate_in_place(in, view); }, {"view of a leaf"});
}

TEST_P(RotaryEmbeddingInPlaceGraph, TablesThatRequireGradAreErrors) {
  for (const bool of_cos : {false, true}) {
    RotaryInputs in = inputs();
    (of_cos ? in.cos : in.sin).requires_grad_();
    for (const bool in_graph : {false, true}) {
      at::Tensor x = in_graph ? in.q.detach().clone().requires_grad_().clone() : in.q.clone();
      expect_error([&] { rotate_in_place(in, x); }, {"posenc::rotary_embedding_: ", "cos and sin", "no grad"});
      expect_error([&] { rotate_in_place(in, x, in.k); }, {"posenc::rotary_embedding_qk_: ", "cos and sin", "no grad"});
    }
    const at::NoGradGuard no_grad;
    EXPECT_NO_THROW(rotate_in_place(in, in.q));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Overlapping memory

TEST_P(RotaryEmbeddingInPlaceGraph, TensorsThatOverlapThemselvesAreErrors) {
  for (const Strides strides : {Strides::one_batch, Strides::one_token, Strides::one_head, Strides::one_channel}) {
    RotaryInputs in = inputs();
    at::Tensor x = random_tensor(in.q.sizes(), {GetParam(), at::kFloat}, strides);
    expect_error([&] { rotate_in_place(in, x); }, {"posenc::rotary_embedding_: ", "expected x", "place of their own"});
    expect_error([&] { rotate_in_place(in, in.q, x); }, {"expected k", "place of their own"});
  }
}

TEST_P(RotaryEmbeddingInPlaceGraph, NeighboursThatShareOneElementAreErrors) {
  const RotaryInputs in = inputs();
  const int64_t channels = in.q.size(3);
  const auto rows_apart = [&](int64_t step) {
    const int64_t tokens = in.q.size(0) * in.q.size(1) * in.q.size(2);
    const at::Tensor memory = at::zeros({tokens * channels}, in.q.options());
    return memory.as_strided(in.q.sizes(), {in.q.size(1) * in.q.size(2) * step, in.q.size(2) * step, step, 1});
  };
  at::Tensor shared = rows_apart(channels - 1);
  expect_error([&] { rotate_in_place(in, shared); }, {"expected x", "place of their own"});
  at::Tensor apart = rows_apart(channels);
  rotate_in_place(in, apart);
}

TEST_P(RotaryEmbeddingInPlaceGraph, QueriesAndKeysThatOverlapAreErrors) {
  RotaryInputs in = inputs();
  const at::Tensor packed = random_tensor({2, 5, 8, 16}, {GetParam(), at::kFloat});
  const auto expect_overlap = [&](at::Tensor q, at::Tensor k) {
    expect_error([&] { rotate_in_place(in, q, k); }, {"posenc::rotary_embedding_qk_: ", "q and k", "overlap"});
  };
  expect_overlap(in.q, in.q);
  expect_overlap(packed.narrow(2, 0, 4), packed.narrow(2, 3, 2));
  expect_overlap(packed.narrow(2, 3, 4), packed.narrow(2, 1, 3));
  expect_overlap(packed, packed.narrow(2, 7, 1));
}

TEST_P(RotaryEmbeddingInPlaceGraph, QueriesAndKeysSideBySideInOneTensorAreNone) {
  RotaryInputs in = inputs();
  const auto expect_rotated = [&](at::Tensor q, at::Tensor k) {
    const at::Tensor expected_q = rotate(in, q);
    const at::Tensor expected_k = rotate(in, k);
    rotate_in_place(in, q, k);
    expect_same_bits(q, expected_q);
    expect_same_bits(k, expected_k);
  };
  const Target target{GetParam(), at::kFloat};
  const at::Tensor heads = random_tensor({2, 5, 8, 16}, target);
  expect_rotated(heads.narrow(2, 0, 4), heads.narrow(2, 4, 2));
  expect_rotated(heads.narrow(2, 5, 3), heads.narrow(2, 0, 5));
  expect_rotated(heads.slice(2, 0, 8, 2), heads.slice(2, 1, 8, 2));
  const at::Tensor channels = random_tensor({2, 5, 3, 32}, target);
  expect_rotated(channels.narrow(3, 16, 16), channels.narrow(3, 0, 16));
  expect_rotated(channels.slice(3, 0, 32, 2), channels.slice(3, 1, 32, 2));
  const at::Tensor head_major = random_tensor({2, 8, 5, 16}, target).transpose(1, 2);
  expect_rotated(head_major.narrow(2, 0, 4), head_major.narrow(2, 4, 4));
}

TEST_P(RotaryEmbeddingInPlaceGraph, OverlapWithTablesOrPositionsIsAnError) {
  constexpr int64_t kElements = 2 * 5 * 4 * 16;
  const at::Tensor memory = at::randn({kElements + 64}).to(GetParam());
  at::Tensor x = memory.narrow(0, 0, kElements).view({2, 5, 4, 16});
  RotaryInputs in = inputs();
  RotaryInputs bad = in;
  bad.cos = memory.narrow(0, 0, 64).view({8, 8});
  expect_error([&] { rotate_in_place(bad, x); }, {"x and cos", "overlap"});
  bad.cos = memory.narrow(0, kElements - 1, 64).view({8, 8});  // overlaps by one element
  expect_error([&] { rotate_in_place(bad, x); }, {"x and cos", "overlap"});
  bad.cos = memory.narrow(0, kElements, 64).view({8, 8});
  EXPECT_NO_THROW(rotate_in_place(bad, x));
  bad = in;
  bad.sin = memory.narrow(0, 576, 64).view({8, 8});
  expect_error([&] { rotate_in_place(bad, in.k, x); }, {"k and sin", "overlap"});
  bad = in;
  bad.positions = memory.narrow(0, 100, 5).view(at::kInt);
  expect_error([&] { rotate_in_place(bad, x); }, {"x and positions", "overlap"});
}

TEST_P(RotaryEmbeddingInPlaceGraph, BadArgumentsAreTheErrorsOfTheRotation) {
  RotaryInputs in = inputs();
  in.positions = at::zeros({4}, at::TensorOptions(at::kLong).device(GetParam()));
  expect_error([&] { rotate_in_place(in, in.q); }, {"posenc::rotary_embedding_: ", "expected positions", "got [4]"});
  expect_error([&] { rotate_in_place(in, in.q, in.k); }, {"posenc::rotary_embedding_qk_: ", "expected positions"});
}

TEST(RotaryEmbeddingInPlaceMeta, ChecksWithoutData) {
  RotaryInputs in = make_inputs(RotaryCase(), {at::kMeta, at::kFloat});
  EXPECT_NO_THROW(rotate_in_place(in, in.q, in.k));
  EXPECT_NO_THROW(rotate_in_place(in, in.q));
  at::Tensor expanded = in.q.narrow(0, 0, 1).expand_as(in.q);
  expect_error([&] { rotate_in_place(in, expanded); }, {"expected x", "place of their own"});
  expanded = in.k.narrow(0, 0, 1).expand_as(in.k);
  expect_error([&] { rotate_in_place(in, in.q, expanded); }, {"expected k", "place of their own"});
}

}  // namespace
}  // namespace posenc::test
