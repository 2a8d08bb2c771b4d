#include "gradcheck.h"
#include "support.h"

#if POSENC_CUDA
#include "cuda_support.h"
#endif

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace posenc::test {
namespace {

/// Results of `posenc::rotary_embedding_backward`.
struct Gradients {
  TensorList inputs;
  at::Tensor cos, sin;
};

Gradients backward(const RotaryInputs& in, const TensorList& grads, const TensorList& inputs) {
  std::vector<c10::IValue> stack{grads,        inputs,         in.cos,       in.sin,
                                 in.positions, in.interleaved, in.conjugate, in.pair_axes};
  c10::Dispatcher::singleton().findSchemaOrThrow("posenc::rotary_embedding_backward", "").callBoxed(stack);
  return {stack[0].toTensorVector(), stack[1].toTensor(), stack[2].toTensor()};
}

/// Calls for every kernel path: vectors, single elements, channels beyond rotary_dim, rows with many tokens or none.
std::vector<RotaryCase> cases() {
  std::vector<RotaryCase> all;
  const auto add = [&](const char* name, const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.name = name;
    change(c);
    all.push_back(c);
    c.interleaved = true;
    c.conjugate = true;
    c.name += "InterleavedConjugate";
    all.push_back(c);
  };
  add("Default", [](RotaryCase& /*c*/) {});
  add("Packed", [](RotaryCase& c) { c.packed = true; });
  add("Tail", [](RotaryCase& c) { c.head_dim = 80, c.rotary_dim = 32; });
  add("OddTail", [](RotaryCase& c) { c.head_dim = 23, c.rotary_dim = 16; });
  add("OnePair", [](RotaryCase& c) { c.head_dim = 2, c.rotary_dim = 2; });
  add("OddPairs", [](RotaryCase& c) { c.head_dim = 18, c.rotary_dim = 18; });
  add("ManyChunks", [](RotaryCase& c) { c.head_dim = 2112, c.rotary_dim = 2080, c.tokens = 2; });
  add("ManyHeads", [](RotaryCase& c) { c.q_heads = 71, c.k_heads = 9, c.head_dim = c.rotary_dim = 64; });
  add("OneHead", [](RotaryCase& c) { c.q_heads = c.k_heads = 1, c.batch = 7; });
  add("ManyBatches", [](RotaryCase& c) { c.batch = 37, c.tokens = 3, c.q_heads = 3, c.k_heads = 1; });
  add("Positions", [](RotaryCase& c) { c.positions = PositionShape::per_batch; });
  add("PositionsOfAllBatches", [](RotaryCase& c) { c.positions = PositionShape::per_token; });
  add("Int32Positions", [](RotaryCase& c) {
    c.positions = PositionShape::per_batch;
    c.position_dtype = at::kInt;
    c.position_strides = PositionStrides::every_other;
  });
  add("OneRowForAllTokens", [](RotaryCase& c) {
    c.positions = PositionShape::per_batch;
    c.tokens = 40;
    c.spare_rows = -39;
  });
  for (const PairAxes pair_axes : {PairAxes::chunked, PairAxes::cycled}) {
    add("SeveralAxes", [&](RotaryCase& c) {
      c.positions = PositionShape::per_batch;
      c.axes = 3;
      c.pair_axes = pair_axes;
      c.head_dim = c.rotary_dim = 96;
    });
  }
  add("TablesPerToken", [](RotaryCase& c) { c.tables = TableShape::per_token; });
  add("TablesPerTokenOfAllBatches", [](RotaryCase& c) { c.tables = TableShape::per_token_shared; });
  for (const Strides strides :
       {Strides::head_major, Strides::token_major, Strides::head_slice, Strides::odd_offset, Strides::every_other,
        Strides::reversed, Strides::one_batch, Strides::one_head, Strides::one_channel}) {
    add(strides_name(strides), [&](RotaryCase& c) { c.q_strides = strides, c.k_strides = strides; });
  }
  for (const TableStrides strides : {TableStrides::slice, TableStrides::transposed, TableStrides::one_row}) {
    add("TableStrides", [&](RotaryCase& c) { c.table_strides = strides, c.positions = PositionShape::per_batch; });
  }
  return all;
}

class RotaryEmbeddingBackward : public TargetTest {
 protected:
  at::Tensor random(at::IntArrayRef sizes, Strides strides = Strides::dense) const {
    return random_tensor(sizes, GetParam(), strides);
  }

  /// Expects gradients of the inputs to have the bits of the opposite rotation, and those of cos and sin to equal the
  /// scalar loop within rounding.
  static void expect_gradients(const RotaryInputs& in, const TensorList& grads, const TensorList& inputs) {
    const Gradients found = backward(in, grads, inputs);
    ASSERT_EQ(found.inputs.size(), grads.size());
    std::vector<std::pair<at::Tensor, at::Tensor>> pairs;
    for (size_t i = 0; i < grads.size(); ++i) {
      const at::Tensor expected = rotate(backwards(in), grads[i]);
      expect_same_bits(found.inputs[i], expected);
      EXPECT_EQ(found.inputs[i].strides(), expected.strides());
      pairs.emplace_back(grads[i], inputs[i]);
    }
    EXPECT_EQ(found.cos.sizes(), in.cos.sizes());
    EXPECT_TRUE(found.cos.is_contiguous());
    EXPECT_TRUE(found.sin.is_contiguous());
    expect_table_gradients(found.cos, found.sin, scalar_table_gradients(in, pairs));
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingBackward, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingBackward, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(RotaryEmbeddingBackward, OfAPairMatchesTheRotationAndTheScalarLoop) {
  for (const RotaryCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = make_inputs(c, GetParam());
    expect_gradients(in, {random(in.q.sizes()), random(in.k.sizes())}, {in.q, in.k});
  }
}

TEST_P(RotaryEmbeddingBackward, OfOneTensorMatchesTheRotationAndTheScalarLoop) {
  for (const RotaryCase& c : cases()) {
    SCOPED_TRACE(::testing::Message() << c);
    const RotaryInputs in = make_inputs(c, GetParam());
    expect_gradients(in, {random(in.q.sizes())}, {in.q});
  }
}

TEST_P(RotaryEmbeddingBackward, TakesGradientsOfAnyStrides) {
  for (int i = 0; i < kStrides; ++i) {
    const auto strides = static_cast<Strides>(i);
    SCOPED_TRACE(strides_name(strides));
    for (const bool interleaved : {false, true}) {
      RotaryCase c;
      c.interleaved = interleaved;
      c.head_dim = 48;
      c.rotary_dim = 32;
      const RotaryInputs in = make_inputs(c, GetParam());
      expect_gradients(in, {random(in.q.sizes(), strides), random(in.k.sizes(), strides)}, {in.q, in.k});
    }
  }
}

TEST_P(RotaryEmbeddingBackward, GivesNanToTokensOutsideTheTablesAndLeavesTheOthers) {
  for (const int64_t head_dim : {16, 40, 19}) {
    RotaryCase c;
    c.batch = 1;
    c.tokens = 50;
    c.head_dim = head_dim;
    RotaryInputs in = make_inputs(c, GetParam());
    const at::Tensor positions = at::arange(50, at::kLong) % 7;
    std::vector<int64_t> outside;  // indices of tokens, including the last
    for (const int64_t position : positions_outside(in.cos.size(0))) {
      outside.push_back(49 - 3 * static_cast<int64_t>(outside.size()));
      positions[outside.back()] = position;
    }
    in.positions = positions.to(device());
    const TensorList grads = {random(in.q.sizes()), random(in.k.sizes())};
    const Gradients found = backward(in, grads, {in.q, in.k});
    for (size_t i = 0; i < 2; ++i) {
      const at::Tensor expected = rotate(backwards(in), grads[i]);
      EXPECT_EQ(
          expected.isnan().sum().item<int64_t>(), static_cast<int64_t>(outside.size()) * expected.size(2) * head_dim);
      EXPECT_TRUE(at::equal(found.inputs[i].isnan(), expected.isnan()));
      expect_same_bits(found.inputs[i].nan_to_num(), expected.nan_to_num());
    }
    at::Tensor inside = at::ones({50}, at::kBool);
    for (const int64_t token : outside) {
      inside[token] = false;
    }
    const auto kept = [&](const at::Tensor& x) { return x.index_select(1, inside.nonzero().flatten().to(device())); };
    RotaryInputs rest = in;
    rest.positions = positions.index({inside}).to(device());
    expect_table_gradients(
        found.cos, found.sin,
        scalar_table_gradients(rest, {{kept(grads[0]), kept(in.q)}, {kept(grads[1]), kept(in.k)}}));
  }
}

TEST_P(RotaryEmbeddingBackward, OfEmptyTensorsIsEmptyAndZero) {
  for (const int empty : {0, 1, 2}) {
    for (const PositionShape positions : {PositionShape::absent, PositionShape::per_batch}) {
      RotaryCase c;
      c.batch = empty == 0 ? 0 : c.batch;
      c.tokens = empty == 1 ? 0 : c.tokens;
      c.q_heads = c.k_heads = empty == 2 ? 0 : c.q_heads;
      c.positions = positions;
      SCOPED_TRACE(::testing::Message() << c);
      const RotaryInputs in = make_inputs(c, GetParam());
      const Gradients found = backward(in, {in.q, in.k}, {in.q, in.k});
      EXPECT_EQ(found.inputs[0].sizes(), in.q.sizes());
      EXPECT_EQ(found.inputs[1].sizes(), in.k.sizes());
      expect_same_bits(found.cos, at::zeros_like(in.cos));
      expect_same_bits(found.sin, at::zeros_like(in.sin));
    }
  }
}

TEST_P(RotaryEmbeddingBackward, IsTheSameBitForBitEachTime) {
  RotaryCase c;
  c.batch = 5;
  c.tokens = 60;
  c.q_heads = 13;
  for (const PositionShape positions : {PositionShape::absent, PositionShape::per_batch}) {
    c.positions = positions;
    c.spare_rows = positions == PositionShape::absent ? 0 : -50;
    const RotaryInputs in = make_inputs(c, GetParam());
    const TensorList grads = {random(in.q.sizes()), random(in.k.sizes())};
    const Gradients first = backward(in, grads, {in.q, in.k});
    for (int repeat = 0; repeat < 3; ++repeat) {
      const Gradients again = backward(in, grads, {in.q, in.k});
      expect_same_bits(again.inputs[0], first.inputs[0]);
      expect_same_bits(again.inputs[1], first.inputs[1]);
      expect_same_bits(again.cos, first.cos);
      expect_same_bits(again.sin, first.sin);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Autograd

class RotaryEmbeddingBackwardGraph : public DeviceTest {
 protected:
  RotaryInputs leaves() const {
    RotaryInputs in = make_inputs(RotaryCase(), {GetParam(), at::kDouble});
    for (at::Tensor* tensor : {&in.q, &in.k, &in.cos, &in.sin}) {
      *tensor = tensor->detach().requires_grad_();
    }
    return in;
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingBackwardGraph, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingBackwardGraph, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryEmbeddingBackwardGraph, IsWhatARecordedBackwardGives) {
  const RotaryInputs in = leaves();
  const auto [q, k] = rotate_qk(in);
  const TensorList all = {in.q, in.k, in.cos, in.sin};
  const TensorList cotangents = {at::randn_like(q), at::randn_like(k)};
  const TensorList found = gradients({q, k}, all, cotangents);
  const TensorList recorded = gradients({q, k}, all, cotangents, /*create_graph=*/true);
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_FALSE(found[i].requires_grad());
    EXPECT_TRUE(recorded[i].requires_grad());
    expect_within(found[i], recorded[i].detach().cpu(), recorded[i].detach().cpu().abs() * 1e-13 + 1e-13);
  }
}

TEST_P(RotaryEmbeddingBackwardGraph, OfSomeOfTheGradientsEqualsAllOfThem) {
  const RotaryInputs in = leaves();
  const auto [q, k] = rotate_qk(in);
  const TensorList cotangents = {at::randn_like(q), at::randn_like(k)};
  const TensorList all = gradients({q, k}, {in.q, in.k, in.cos, in.sin}, cotangents);
  expect_same_bits(gradients({q, k}, {in.q, in.k, in.sin}, cotangents)[2], all[3]);
  const TensorList without_k = gradients({q, k}, {in.q, in.cos, in.sin}, cotangents);
  expect_same_bits(without_k[0], all[0]);
  expect_within(without_k[1], all[2].cpu(), all[2].cpu().abs() * 1e-13 + 1e-13);
  expect_same_bits(gradients({q, k}, {in.q, in.k}, cotangents)[1], all[1]);
}

TEST_P(RotaryEmbeddingBackwardGraph, OfAnOutputThatIsNotUsedIsThatOfTheOther) {
  const RotaryInputs in = leaves();
  const at::Tensor grad = at::randn_like(in.k);
  const TensorList found = gradients({std::get<1>(rotate_qk(in))}, {in.q, in.k, in.cos, in.sin}, {grad});
  const Gradients expected = backward(in, {grad}, {in.k.detach()});
  expect_same_bits(found[0], at::zeros_like(in.q));
  expect_same_bits(found[1], expected.inputs[0].detach());
  expect_within(found[2], expected.cos.detach().cpu(), expected.cos.detach().cpu().abs() * 1e-13 + 1e-13);
}

TEST_P(RotaryEmbeddingBackwardGraph, IsItselfDifferentiable) {
  const RotaryInputs in = leaves();
  const at::Tensor grad = at::randn_like(in.q).requires_grad_();
  const Differentiable function = [&](const TensorList& tensors) {
    RotaryInputs moved = in;
    moved.cos = tensors[2];
    moved.sin = tensors[3];
    const Gradients found = backward(moved, {tensors[0]}, {tensors[1]});
    return TensorList{found.inputs[0], found.cos, found.sin};
  };
  gradcheck(function, {grad, in.q, in.cos, in.sin});
}

TEST(RotaryEmbeddingBackwardErrors, NameWhatIsWrong) {
  const std::string of_two = "posenc::rotary_embedding";  // on the CPU, the operators it is composed of check
  const RotaryInputs in = make_inputs(RotaryCase(), {at::kCPU, at::kFloat});
  expect_error([&] { backward(in, {in.q}, {in.q, in.k}); }, {of_two, "grads", "inputs", "got 2 and 1"});
  expect_error([&] { backward(in, {}, {}); }, {of_two, "one or two inputs", "got 0"});
  expect_error([&] { backward(in, {in.k}, {in.q}); }, {of_two, "grads[0]", "[2, 5, 4, 16]", "got [2, 5, 2, 16]"});
  RotaryInputs bad = in;
  bad.sin = in.sin.narrow(0, 0, 5);
  expect_error([&] { backward(bad, {in.q}, {in.q}); }, {of_two, "cos and sin of the same shape"});
}

TEST(RotaryEmbeddingBackwardMeta, HasTheShapesOfTheCpu) {
  const RotaryInputs in = make_inputs(RotaryCase(), {at::kMeta, at::kBFloat16});
  const Gradients found = backward(in, {in.q, in.k}, {in.q, in.k});
  EXPECT_EQ(found.inputs[1].sizes(), in.k.sizes());
  EXPECT_EQ(found.inputs[1].scalar_type(), at::kBFloat16);
  EXPECT_EQ(found.cos.sizes(), in.cos.sizes());
  EXPECT_EQ(found.sin.scalar_type(), at::kFloat);
  EXPECT_TRUE(found.sin.is_meta());
}

#if POSENC_CUDA

class RotaryEmbeddingBackwardCuda : public ::testing::Test {
 protected:
  void SetUp() override { require_device(at::kCUDA); }
};

TEST_F(RotaryEmbeddingBackwardCuda, ErrorsNameWhatIsWrong) {
  const std::string op = "posenc::rotary_embedding_backward: ";
  const RotaryInputs in = make_inputs(RotaryCase(), {at::kCUDA, at::kFloat});
  expect_error([&] { backward(in, {in.q}, {in.q, in.k}); }, {op, "grads", "inputs", "got 2 and 1"});
  expect_error([&] { backward(in, {}, {}); }, {op, "one or two inputs", "got 0"});
  expect_error([&] { backward(in, {in.k}, {in.q}); }, {op, "grads[0]", "[2, 5, 4, 16]", "got [2, 5, 2, 16]"});
  RotaryInputs bad = in;
  bad.sin = in.sin.narrow(0, 0, 5);
  expect_error([&] { backward(bad, {in.q}, {in.q}); }, {op, "cos and sin of the same shape"});
  bad.sin = in.sin.cpu();
  expect_error([&] { backward(bad, {in.q}, {in.q}); }, {op, "sin on the device of", "cpu"});
}

TEST_F(RotaryEmbeddingBackwardCuda, IsOneKernel) {
  require_caching_allocator();
  if (IsSkipped()) {
    return;
  }
  const RotaryInputs in = make_inputs(RotaryCase(), {at::kCUDA, at::kHalf});
  EXPECT_EQ(
      recorded_nodes([&] { backward(in, {in.q, in.k}, {in.q, in.k}); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
}

TEST_F(RotaryEmbeddingBackwardCuda, IsWhatABackwardPassRuns) {
  require_caching_allocator();
  if (IsSkipped()) {
    return;
  }
  RotaryInputs in = make_inputs(RotaryCase(), {at::kCUDA, at::kHalf});
  for (at::Tensor* tensor : {&in.q, &in.k, &in.cos, &in.sin}) {
    *tensor = tensor->detach().requires_grad_();
  }
  const TensorList cotangents = {at::randn_like(in.q), at::randn_like(in.k)};
  const auto nodes = recorded_nodes([&] {
    const auto [q, k] = rotate_qk(in);
    gradients({q, k}, {in.q, in.k, in.cos, in.sin}, cotangents);
  });
  EXPECT_EQ(nodes, (NodeCounts{{cudaGraphNodeTypeKernel, 2}}));
}

TEST_F(RotaryEmbeddingBackwardCuda, OfMoreThan65535RowsAndStrayTokensWorks) {
  RotaryCase c;
  c.batch = 1;
  c.tokens = 70000;
  c.q_heads = 2;
  c.k_heads = 1;
  c.positions = PositionShape::per_token;
  RotaryInputs in = make_inputs(c, {at::kCUDA, at::kHalf});
  in.positions = at::arange(70000, at::kLong).flip(0).to(at::kCUDA) + 10;
  const Gradients found = backward(in, {in.q, in.k}, {in.q, in.k});
  const at::Tensor expected = rotate(backwards(in), in.q);
  EXPECT_TRUE(at::equal(found.inputs[0].isnan(), expected.isnan()));
  expect_same_bits(found.inputs[0].nan_to_num(), expected.nan_to_num());
}

#endif

}  // namespace
}  // namespace posenc::test
