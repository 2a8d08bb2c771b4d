#include "gradcheck.h"
#include "rotary_embedding_inplace_support.h"

#if POSENC_CUDA
#include "cuda_support.h"
#endif

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

class RotaryEmbeddingInPlace : public TargetTest {
 protected:
  RotaryInputs inputs(const RotaryCase& c = RotaryCase()) const { return make_inputs(c, GetParam()); }

  static std::vector<RotaryCase> cases() {
    std::vector<RotaryCase> cases;
    const auto add = [&cases](const std::function<void(RotaryCase&)>& change) {
      RotaryCase c;
      change(c);
      cases.push_back(c);
    };
    add([](RotaryCase& /*c*/) {});
    add([](RotaryCase& c) { c.interleaved = true; });
    add([](RotaryCase& c) { c.head_dim = 24, c.conjugate = true; });
    add([](RotaryCase& c) { c.head_dim = 19, c.rotary_dim = 6, c.interleaved = true; });
    add([](RotaryCase& c) { c.packed = true, c.positions = PositionShape::per_token; });
    add([](RotaryCase& c) { c.positions = PositionShape::per_batch, c.axes = 3, c.pair_axes = PairAxes::cycled; });
    for (const Strides strides :
         {Strides::head_major, Strides::token_major, Strides::head_slice, Strides::odd_offset, Strides::every_other,
          Strides::reversed}) {
      add([=](RotaryCase& c) { c.q_strides = c.k_strides = strides; });
    }
    return cases;
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingInPlace, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingInPlace, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(RotaryEmbeddingInPlace, HasTheBitsOfTheRotationOutOfPlace) {
  for (const RotaryCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    RotaryInputs in = inputs(c);
    const auto [q, k] = rotate_qk(in);
    at::Tensor x = random_tensor(in.q.sizes(), GetParam(), c.q_strides);
    const at::Tensor expected = rotate(in, x);
    rotate_in_place(in, x);
    expect_same_bits(x, expected);
    rotate_in_place(in, in.q, in.k);
    expect_same_bits(in.q, q);
    expect_same_bits(in.k, k);
  }
}

TEST_P(RotaryEmbeddingInPlace, ReturnsItsArguments) {
  RotaryInputs in = inputs();
  EXPECT_EQ(&posenc::rotary_embedding_(in.q, in.cos, in.sin), &in.q);
  const auto [q, k] = posenc::rotary_embedding_qk_(in.q, in.k, in.cos, in.sin);
  EXPECT_EQ(&q, &in.q);
  EXPECT_EQ(&k, &in.k);
}

TEST_P(RotaryEmbeddingInPlace, WritesNothingElse) {
  const RotaryCase c;
  RotaryInputs in = inputs(c);
  at::Tensor packed = random_tensor({2, 5, 9, 16}, GetParam());
  const at::Tensor before = packed.clone();
  in.q = packed.narrow(2, 1, 4);
  in.k = packed.narrow(2, 5, 2);
  const auto [q, k] = rotate_qk(in);
  rotate_in_place(in, in.q, in.k);
  expect_same_bits(packed.narrow(2, 1, 4), q);
  expect_same_bits(packed.narrow(2, 5, 2), k);
  expect_same_bits(packed.narrow(2, 0, 1), before.narrow(2, 0, 1));
  expect_same_bits(packed.narrow(2, 7, 2), before.narrow(2, 7, 2));
}

TEST_P(RotaryEmbeddingInPlace, GradientsAreThoseOfTheRotationOutOfPlace) {
  for (const RotaryCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    RotaryInputs in = inputs(c);
    const at::Tensor q_leaf = in.q.detach().requires_grad_();
    const at::Tensor k_leaf = in.k.detach().requires_grad_();
    in.q = q_leaf.clone();
    in.k = k_leaf.clone();
    rotate_in_place(in, in.q, in.k);
    RotaryInputs back = backwards(in);
    back.q = random_tensor(in.q.sizes(), GetParam());
    back.k = random_tensor(in.k.sizes(), GetParam());
    const TensorList found = gradients({in.q, in.k}, {q_leaf, k_leaf}, {back.q, back.k});
    const auto [expected_q, expected_k] = rotate_qk(back);
    expect_same_bits(found[0], expected_q);
    expect_same_bits(found[1], expected_k);
  }
}

TEST_P(RotaryEmbeddingInPlace, GradientsOfViewsOfOneBaseReachTheBase) {
  RotaryInputs in = inputs();
  const at::Tensor leaf = random_tensor({2, 5, 8, 16}, GetParam()).requires_grad_();
  const at::Tensor packed = leaf.clone();
  in.q = packed.narrow(2, 0, 4);
  in.k = packed.narrow(2, 4, 2);
  rotate_in_place(in, in.q, in.k);
  const at::Tensor grad = random_tensor(leaf.sizes(), GetParam());
  RotaryInputs back = backwards(in);
  back.q = grad.narrow(2, 0, 4);
  back.k = grad.narrow(2, 4, 2);
  const auto [grad_q, grad_k] = rotate_qk(back);
  expect_same_bits(gradients({packed}, {leaf}, {grad})[0], at::cat({grad_q, grad_k, grad.narrow(2, 6, 2)}, 2));
  // Backward from each view alone.
  const at::Tensor of_q = gradients({in.q}, {leaf}, {back.q})[0];
  expect_same_bits(of_q.narrow(2, 0, 4), grad_q);
  EXPECT_FALSE(of_q.narrow(2, 4, 4).any().item<bool>());
  const at::Tensor of_k = gradients({in.k}, {leaf}, {back.k})[0];
  expect_same_bits(of_k.narrow(2, 4, 2), grad_k);
}

TEST_P(RotaryEmbeddingInPlace, OnlyOneOfTheTwoIsAView) {
  for (const bool q_is_view : {false, true}) {
    RotaryInputs in = inputs();
    const at::Tensor q_leaf = in.q.detach().requires_grad_();
    const at::Tensor k_leaf = in.k.detach().requires_grad_();
    in.q = q_leaf.clone();
    in.k = k_leaf.clone();
    at::Tensor& viewed = q_is_view ? in.q : in.k;
    const at::Tensor base = viewed;
    viewed = base.narrow(2, 0, base.size(2));
    rotate_in_place(in, in.q, in.k);
    RotaryInputs back = backwards(in);
    back.q = random_tensor(in.q.sizes(), GetParam());
    back.k = random_tensor(in.k.sizes(), GetParam());
    const auto [expected_q, expected_k] = rotate_qk(back);
    const TensorList of_base =
        gradients({q_is_view ? base : in.q, q_is_view ? in.k : base}, {q_leaf, k_leaf}, {back.q, back.k});
    expect_same_bits(of_base[0], expected_q);
    expect_same_bits(of_base[1], expected_k);
  }
}

TEST_P(RotaryEmbeddingInPlace, OnlyOneOfTheTwoRequiresGrad) {
  for (const bool q_requires : {false, true}) {
    RotaryInputs in = inputs();
    const at::Tensor leaf = (q_requires ? in.q : in.k).detach().clone().requires_grad_();
    (q_requires ? in.q : in.k) = leaf.clone();
    rotate_in_place(in, in.q, in.k);
    EXPECT_EQ(in.q.requires_grad(), q_requires);
    EXPECT_EQ(in.k.requires_grad(), !q_requires);
    const at::Tensor y = q_requires ? in.q : in.k;
    const at::Tensor grad = random_tensor(y.sizes(), GetParam());
    expect_same_bits(gradients({y}, {leaf}, {grad})[0], rotate(backwards(in), grad));
  }
}

TEST_P(RotaryEmbeddingInPlace, EmptyTensorsWork) {
  for (const int empty : {0, 1, 2}) {
    RotaryCase c;
    c.batch = empty == 0 ? 0 : c.batch;
    c.tokens = empty == 1 ? 0 : c.tokens;
    c.q_heads = empty == 2 ? 0 : c.q_heads;
    RotaryInputs in = inputs(c);
    const at::Tensor expected = rotate(in, in.k);
    rotate_in_place(in, in.q, in.k);
    expect_same_bits(in.k, expected);
    rotate_in_place(in, in.q);
  }
}

TEST_P(RotaryEmbeddingInPlace, PositionOutsideTheTableGivesNan) {
  RotaryInputs in = inputs();
  in.positions = at::tensor({0, 1, 8, 3, 4}, at::kLong).to(device());
  const at::Tensor expected = rotate(in, in.q);
  rotate_in_place(in, in.q);
  EXPECT_TRUE(in.q.select(1, 2).isnan().all().item<bool>());
  expect_same_bits(in.q.select(1, 3), expected.select(1, 3));
}

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

#if POSENC_CUDA

class RotaryEmbeddingInPlaceCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    require_device(at::kCUDA);
    require_caching_allocator();
  }
};

TEST_F(RotaryEmbeddingInPlaceCuda, ForwardAndBackwardAreOneKernelEach) {
  RotaryInputs in = make_inputs(RotaryCase(), {at::kCUDA, at::kBFloat16});
  EXPECT_EQ(recorded_nodes([&] { rotate_in_place(in, in.q, in.k); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
  const at::Tensor q_leaf = in.q.detach().requires_grad_();
  const at::Tensor k_leaf = in.k.detach().requires_grad_();
  const TensorList cotangents{at::ones_like(in.q), at::ones_like(in.k)};
  TensorList found;
  const auto run = [&] {
    at::Tensor q = q_leaf.clone();
    at::Tensor k = k_leaf.clone();
    rotate_in_place(in, q, k);
    found = gradients({q, k}, {q_leaf, k_leaf}, cotangents);
  };
  EXPECT_EQ(recorded_nodes(run).at(cudaGraphNodeTypeKernel), 2);
  at::cuda::CUDAGraph graph;
  capture(graph, run);
  graph.replay();
  c10::cuda::device_synchronize();
  expect_same_bits(found[0], rotate(backwards(in), cotangents[0]));
  expect_same_bits(found[1], rotate(backwards(in), cotangents[1]));
}

TEST_F(RotaryEmbeddingInPlaceCuda, ManySequencesAndManyElementsWork) {
  RotaryCase c;
  c.batch = 70'000;
  c.tokens = c.q_heads = c.k_heads = 1;
  c.head_dim = c.rotary_dim = 4;
  RotaryInputs in = make_inputs(c, {at::kCUDA, at::kFloat});
  const at::Tensor before = in.q.clone();
  rotate_in_place(in, in.q);
  expect_close_to_rounding(in.q, in, before);
}

#endif

}  // namespace
}  // namespace posenc::test
