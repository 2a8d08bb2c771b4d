#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <posenc/context_parallel_alibi_attention.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#ifdef USE_DISTRIBUTED
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#endif

namespace posenc::test {
namespace {

// Groups of one rank and errors, which need no communication. Larger groups: tests/python/context_parallel_test.py.

AttentionCase shard() {
  AttentionCase c;
  c.q_len = c.k_len = 6;
  c.causal = true;
  return c;
}

const ContextParallelALiBiAttentionOptions kCausal = ContextParallelALiBiAttentionOptions().causal(true);

TEST(ContextParallelAlibiAttention, SchemaIsThePublicOne) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("posenc::context_parallel_alibi_attention", "");
  EXPECT_EQ(
      c10::str(op.schema()),
      "posenc::context_parallel_alibi_attention(Tensor q, Tensor k, Tensor v, Tensor slopes, str group_name, *, "
      "float? scale=None, bool causal=False) -> (Tensor out, Tensor lse)");
}

#ifdef USE_DISTRIBUTED

using Group = c10::intrusive_ptr<c10d::ProcessGroup>;

/// A group without a backend.
Group group_of(int size) {
  return c10::make_intrusive<c10d::ProcessGroup>(/*rank=*/0, size);
}

/// A name that a group has for the lifetime of the object.
class ScopedName {
 public:
  ScopedName(std::string name, const Group& group) : name_(std::move(name)) {
    c10d::register_process_group(name_, group);
  }
  ~ScopedName() { c10d::unregister_process_group(name_); }
  ScopedName(const ScopedName&) = delete;
  ScopedName& operator=(const ScopedName&) = delete;

 private:
  std::string name_;
};

/// Output and gradients for the gradient `grad`.
TensorList everything(const AttentionInputs& in, const at::Tensor& out, const at::Tensor& grad) {
  TensorList results = gradients({out}, {in.q, in.k, in.v, in.slopes}, {grad});
  results.insert(results.begin(), out);
  return results;
}

void expect_equal(const TensorList& actual, const TensorList& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(at::allclose(actual[i], expected[i], /*rtol=*/1e-12, /*atol=*/1e-14)) << "result " << i;
  }
}

TEST(ContextParallelAlibiAttention, OneRankHasTheWhole) {
  const AttentionInputs in = attention_leaves(make_attention_inputs(shard(), {at::kCPU, at::kDouble}));
  const at::Tensor grad = at::randn_like(in.q);
  const TensorList expected = everything(in, attend(in), grad);
  const Group group = group_of(1);
  expect_equal(
      everything(in, context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group, kCausal), grad), expected);
}

TEST(ContextParallelAlibiAttention, AGroupIsFoundByItsName) {
  const AttentionInputs in = attention_leaves(make_attention_inputs(shard(), {at::kCPU, at::kDouble}));
  const at::Tensor grad = at::randn_like(in.q);
  const Group group = group_of(1);
  const ScopedName name("one", group);
  expect_equal(
      everything(in, context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, "one", kCausal), grad),
      everything(in, attend(in), grad));
}

TEST(ContextParallelAlibiAttention, TheGroupOutlivesTheCallersHandle) {
  const AttentionInputs in = attention_leaves(make_attention_inputs(shard(), {at::kCPU, at::kDouble}));
  at::Tensor out;
  {
    const Group group = group_of(1);
    out = context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group, kCausal);
  }
  const at::Tensor grad = at::randn_like(in.q);
  expect_equal(everything(in, out, grad), everything(in, attend(in), grad));
}

TEST(ContextParallelAlibiAttention, RefusesAGroupThatIsNone) {
  const AttentionInputs in = make_attention_inputs(shard(), {at::kCPU, at::kFloat});
  expect_error(
      [&] { context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, Group()); },
      {"posenc::context_parallel_alibi_attention: expected group to be a process group", "got none"});
  expect_error(
      [&] { context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, "nobody"); },
      {"expected group_name", "registered process group", "got \"nobody\""});
}

TEST(ContextParallelAlibiAttention, RefusesSequencesThatAreTooLongTogether) {
  const AttentionInputs in = make_attention_inputs(shard(), {at::kCPU, at::kFloat});
  expect_error(
      [&] { context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group_of(1 << 30)); },
      {"expected at most 2147483647 tokens of all ranks", "got 6 on each of 1073741824"});
}

struct BadShard {
  std::string name;
  std::function<void(AttentionInputs&)> change;
  std::vector<std::string> parts;
};

std::ostream& operator<<(std::ostream& stream, const BadShard& bad) {
  return stream << bad.name;
}

class ContextParallelErrors : public ::testing::TestWithParam<BadShard> {};

TEST_P(ContextParallelErrors, NameTheArgumentBeforeAnythingIsSent) {
  AttentionInputs in = make_attention_inputs(shard(), {at::kCPU, at::kFloat});
  GetParam().change(in);
  std::vector<std::string> parts = GetParam().parts;
  parts.emplace_back("posenc::context_parallel_alibi_attention: expected");
  // It has no backend: to send anything would be another error.
  expect_error([&] { context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group_of(2)); }, parts);
}

INSTANTIATE_TEST_SUITE_P(
    All,
    ContextParallelErrors,
    ::testing::Values(
        BadShard{"PackedQ", [](AttentionInputs& in) { in.q = in.q[0]; }, {"q of shape [B, S / C, Hq, D]", "[6, 4, 8]"}},
        BadShard{
            "OddShard",
            [](AttentionInputs& in) {
              for (at::Tensor* x : {&in.q, &in.k, &in.v}) {
                *x = x->narrow(1, 0, 5);
              }
            },
            {"q of an even number of tokens", "[2, 5, 4, 8]"}},
        BadShard{"UndefinedQ", [](AttentionInputs& in) { in.q = at::Tensor(); }, {"q to be a tensor"}},
        BadShard{"UndefinedSlopes", [](AttentionInputs& in) { in.slopes = at::Tensor(); }, {"slopes to be a tensor"}},
        BadShard{
            "OtherLength",
            [](AttentionInputs& in) { in.k = in.v = in.k.narrow(1, 0, 4); },
            {"k and v of as many tokens as q, 6, got 4"}},
        BadShard{
            "OtherShapeOfV",
            [](AttentionInputs& in) { in.v = in.v.narrow(1, 0, 4); },
            {"v of the shape, dtype and device of k", "[2, 4, 2, 8]"}},
        BadShard{
            "OtherDtypeOfK",
            [](AttentionInputs& in) { in.k = in.k.to(at::kHalf); },
            {"k of the dtype and device of q", "got Half"}},
        BadShard{
            "Heads",
            [](AttentionInputs& in) { in.q = in.q.narrow(2, 0, 3), in.slopes = in.slopes.narrow(0, 0, 3); },
            {"multiple of that of key heads, got 3 and 2"}},
        BadShard{
            "SlopesOfOtherHeads",
            [](AttentionInputs& in) { in.slopes = in.slopes.narrow(0, 0, 2); },
            {"slopes of shape [H] = [4], got [2]"}}),
    [](const auto& test) { return test.param.name; });

#else

TEST(ContextParallelAlibiAttention, SaysThatThereAreNoGroups) {
  const AttentionInputs in = make_attention_inputs(shard(), {at::kCPU, at::kFloat});
  expect_error(
      [&] { context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, "any", kCausal); },
      {"expected a LibTorch with process groups", "without c10d"});
}

#endif

}  // namespace
}  // namespace posenc::test
