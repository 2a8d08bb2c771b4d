#include "gradcheck.h"
#include "support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace posenc::test {
namespace {

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

/// Calls an operator boxed, as TorchScript and Python do.
std::vector<c10::IValue> call_boxed(const char* name, std::vector<c10::IValue> stack) {
  find(name).callBoxed(stack);
  return stack;
}

TEST(Dispatcher, SchemasAreThePublicOnes) {
  const auto schema = [](const char* name) { return c10::str(find(name).schema()); };
  EXPECT_EQ(
      schema("posenc::rotary_embedding"),
      "posenc::rotary_embedding(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> Tensor");
  EXPECT_EQ(
      schema("posenc::rotary_embedding_qk"),
      "posenc::rotary_embedding_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> (Tensor, Tensor)");
  EXPECT_EQ(
      schema("posenc::rotary_embedding_"),
      "posenc::rotary_embedding_(Tensor(a!) x, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> ()");
  EXPECT_EQ(
      schema("posenc::rotary_embedding_qk_"),
      "posenc::rotary_embedding_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> ()");
  EXPECT_EQ(
      schema("posenc::rotary_embedding_qkv"),
      "posenc::rotary_embedding_qkv(Tensor qkv, int num_q_heads, int num_kv_heads, Tensor cos, Tensor sin, "
      "Tensor? positions=None, *, bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) "
      "-> (Tensor, Tensor, Tensor)");
  EXPECT_EQ(
      schema("posenc::rotary_embedding_pack"),
      "posenc::rotary_embedding_pack(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? positions=None, *, "
      "bool stacked=False, bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> Tensor");
  EXPECT_EQ(
      schema("posenc::rotary_embedding_tables_backward"),
      "posenc::rotary_embedding_tables_backward(Tensor[] grads, Tensor[] inputs, Tensor cos, Tensor sin, "
      "Tensor? positions=None, *, bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> (Tensor, "
      "Tensor)");
  EXPECT_EQ(
      schema("posenc::rotary_embedding_backward"),
      "posenc::rotary_embedding_backward(Tensor[] grads, Tensor[] inputs, Tensor cos, Tensor sin, "
      "Tensor? positions=None, *, bool interleaved=False, bool conjugate=False, int[] pair_axes=[]) -> "
      "(Tensor[], Tensor, Tensor)");
  EXPECT_EQ(
      schema("posenc::rotary_tables"),
      "posenc::rotary_tables(Tensor inv_freq, SymInt length, *, ScalarType dtype=6, float attention_factor=1.) "
      "-> (Tensor, Tensor)");
  EXPECT_EQ(
      schema("posenc::rotary_tables_backward"),
      "posenc::rotary_tables_backward(Tensor grad_cos, Tensor grad_sin, Tensor cos, Tensor sin, *, "
      "ScalarType dtype=6) -> Tensor");
}

TEST(Dispatcher, EveryOperatorHasItsKernels) {
  for (const char* name :
       {"posenc::rotary_embedding", "posenc::rotary_embedding_", "posenc::rotary_embedding_qk",
        "posenc::rotary_embedding_qk_", "posenc::rotary_embedding_qkv", "posenc::rotary_embedding_pack",
        "posenc::rotary_embedding_backward", "posenc::rotary_embedding_tables_backward", "posenc::rotary_tables",
        "posenc::rotary_tables_backward"}) {
    SCOPED_TRACE(name);
    EXPECT_TRUE(find(name).hasComputedKernelForDispatchKey(c10::DispatchKey::CPU));
    EXPECT_TRUE(find(name).hasComputedKernelForDispatchKey(c10::DispatchKey::Meta));
    EXPECT_EQ(find(name).hasKernelForDispatchKey(c10::DispatchKey::CUDA), kBuiltWithCuda);
  }
}

TEST(Dispatcher, CallByNameEqualsTheFreeFunction) {
  RotaryCase c;
  c.positions = PositionShape::per_batch;
  c.axes = 2;
  c.interleaved = true;
  c.conjugate = true;
  const RotaryInputs in = make_inputs(c, {at::kCPU, at::kFloat});
  const auto stack = call_boxed(
      "posenc::rotary_embedding", {in.q, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes});
  ASSERT_EQ(stack.size(), 1U);
  expect_same_bits(stack[0].toTensor(), rotate(in, in.q));
}

TEST(Dispatcher, CallOfThePairByNameEqualsTheFreeFunction) {
  const RotaryInputs in = make_inputs(RotaryCase(), {at::kCPU, at::kFloat});
  const auto stack = call_boxed(
      "posenc::rotary_embedding_qk",
      {in.q, in.k, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes});
  ASSERT_EQ(stack.size(), 2U);
  const auto [q, k] = rotate_qk(in);
  expect_same_bits(stack[0].toTensor(), q);
  expect_same_bits(stack[1].toTensor(), k);
}

TEST(Dispatcher, CallByNameIsDifferentiable) {
  RotaryInputs in = make_inputs(RotaryCase(), {at::kCPU, at::kFloat});
  in.q.requires_grad_();
  const auto stack = call_boxed(
      "posenc::rotary_embedding", {in.q, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes});
  const at::Tensor y = stack[0].toTensor();
  const at::Tensor grad = at::randn(y.sizes());
  const RotaryInputs conjugate = backwards(in);
  expect_same_bits(gradients({y}, {in.q}, {grad})[0], rotate(conjugate, grad));
}

// ---------------------------------------------------------------------------------------------------------------------
// rotary_embedding_tables_backward, the gradients of cos and sin

std::tuple<at::Tensor, at::Tensor> tables_backward(
    const TensorList& grads,
    const TensorList& inputs,
    const at::Tensor& table,  // for cos and sin, of which only shape and dtype are read
    const std::optional<at::Tensor>& positions) {
  const auto stack = call_boxed(
      "posenc::rotary_embedding_tables_backward",
      {grads, inputs, table, table, positions, false, false, std::vector<int64_t>()});
  return {stack[0].toTensor(), stack[1].toTensor()};
}

TEST(RotaryEmbeddingTablesBackward, MatchesTheScalarLoop) {
  for (const PositionShape positions : {PositionShape::absent, PositionShape::per_token, PositionShape::per_batch}) {
    RotaryCase c;
    c.positions = positions;
    c.table_strides = TableStrides::slice;
    const RotaryInputs in = make_inputs(c, {at::kCPU, at::kFloat});
    const at::Tensor grad_q = at::randn(in.q.sizes());
    const at::Tensor grad_k = at::randn(in.k.sizes());
    const auto [dcos, dsin] = tables_backward({grad_q, grad_k}, {in.q, in.k}, in.cos, in.positions);
    EXPECT_EQ(dcos.sizes(), in.cos.sizes());
    EXPECT_EQ(dcos.scalar_type(), in.cos.scalar_type());
    expect_table_gradients(dcos, dsin, scalar_table_gradients(in, {{grad_q, in.q}, {grad_k, in.k}}));
  }
}

TEST(RotaryEmbeddingTablesBackward, RejectsBadArguments) {
  const RotaryInputs in = make_inputs(RotaryCase(), {at::kCPU, at::kFloat});
  const auto expect_rejected = [&](const TensorList& grads, const TensorList& inputs, std::vector<std::string> parts) {
    parts.emplace_back("posenc::rotary_embedding_tables_backward: ");
    expect_error([&] { tables_backward(grads, inputs, in.cos, std::nullopt); }, parts);
  };
  expect_rejected({in.q}, {in.q, in.k}, {"grads", "inputs", "got 2 and 1"});
  expect_rejected({in.q, in.q, in.q}, {in.q, in.q, in.q}, {"one or two inputs", "got 3"});
  expect_rejected({in.k}, {in.q}, {"grads[0]", "[2, 5, 4, 16]", "got [2, 5, 2, 16]"});
  expect_rejected({in.q, in.k.to(at::kHalf)}, {in.q, in.k}, {"grads[1]", "Float", "Half"});
  expect_rejected({in.q[0][0]}, {in.q[0][0]}, {"inputs[0]", "[4, 16]"});
}

}  // namespace
}  // namespace posenc::test
