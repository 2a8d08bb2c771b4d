#include "alibi_attention_support.h"
#include "context_parallel_support.h"
#include "gradcheck.h"

#include <posenc/context_parallel_alibi_attention.h>
#include <posenc/positions.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#ifdef USE_DISTRIBUTED
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#endif

#include <limits>
#include <mutex>

namespace posenc::test {
namespace {

// Errors, groups of one rank and rings of threads. Processes, with Gloo and NCCL:
// tests/python/context_parallel_test.py.

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
      "posenc::context_parallel_alibi_attention(Tensor q, Tensor k, Tensor v, Tensor? slopes, str group_name, *, "
      "float? scale=None, bool causal=False) -> (Tensor out, Tensor lse)");
}

#ifdef USE_DISTRIBUTED

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
    ASSERT_EQ(actual[i].defined(), expected[i].defined());
    if (!actual[i].defined()) {
      continue;
    }
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

/// A call over `ranks` ranks that are threads, put together again: output and gradients of q, k, v and slopes, the
/// latter summed over the ranks.
TensorList everything_of_ring(const AttentionInputs& whole, const at::Tensor& grad, int ranks, bool causal) {
  TensorList result{at::zeros_like(whole.q)};
  for (const at::Tensor& x : {whole.q, whole.k, whole.v, whole.slopes}) {
    result.push_back(x.defined() ? at::zeros_like(x) : x);
  }
  std::mutex mutex;
  const auto options = ContextParallelALiBiAttentionOptions().causal(causal);
  for_each_rank(ranks, at::kCPU, [&](const Group& group) {
    const at::Tensor tokens = context_parallel_positions(whole.q.size(1), group->getRank(), group->getSize());
    const auto part = [&tokens](const at::Tensor& x) { return x.detach().index_select(1, tokens); };
    AttentionInputs in = whole;
    in.q = part(whole.q), in.k = part(whole.k), in.v = part(whole.v);
    in = attention_leaves(in);
    const at::Tensor out = in.slopes.defined()
        ? context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group, options)
        : context_parallel_attention(in.q, in.k, in.v, group, options);
    const TensorList actual = everything(in, out, part(grad));
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < 4; ++i) {
      result[i].index_copy_(1, tokens, actual[i].detach());
    }
    if (result[4].defined()) {
      result[4] += actual[4];
    }
  });
  return result;
}

AttentionCase ring_case(int ranks, bool causal) {
  AttentionCase c;
  c.q_len = c.k_len = 6 * ranks;
  c.causal = causal;
  return c;
}

class ContextParallelThreads : public ::testing::TestWithParam<std::tuple<int, bool>> {};

TEST_P(ContextParallelThreads, EqualTheWhole) {
  const auto [ranks, causal] = GetParam();
  AttentionInputs whole = make_attention_inputs(ring_case(ranks, causal), {at::kCPU, at::kDouble});
  whole.slopes = whole.slopes.to(at::kDouble);  // so that its gradient is float64
  const at::Tensor grad = at::randn_like(whole.q);
  const AttentionInputs leaves = attention_leaves(whole);
  expect_equal(everything_of_ring(whole, grad, ranks, causal), everything(leaves, attend(leaves), grad));
}

TEST_P(ContextParallelThreads, EqualTheWholeWithSlopesOfSequences) {
  const auto [ranks, causal] = GetParam();
  AttentionCase c = ring_case(ranks, causal);
  c.slopes_of_sequences = true;
  AttentionInputs whole = make_attention_inputs(c, {at::kCPU, at::kDouble});
  whole.slopes = whole.slopes.to(at::kDouble);
  const at::Tensor grad = at::randn_like(whole.q);
  const AttentionInputs leaves = attention_leaves(whole);
  expect_equal(everything_of_ring(whole, grad, ranks, causal), everything(leaves, attend(leaves), grad));
}

TEST_P(ContextParallelThreads, EqualTheWholeWithoutSlopes) {
  const auto [ranks, causal] = GetParam();
  AttentionCase c = ring_case(ranks, causal);
  c.with_slopes = false;
  const AttentionInputs whole = make_attention_inputs(c, {at::kCPU, at::kDouble});
  const at::Tensor grad = at::randn_like(whole.q);
  const AttentionInputs leaves = attention_leaves(whole);
  expect_equal(everything_of_ring(whole, grad, ranks, causal), everything(leaves, attend(leaves), grad));
}

/// Parts of an output are rounded to its dtype, and their sum once more. Two independent roundings are about 0.6 of a
/// roundoff in the norm; with sums in that dtype it would be one for each rank.
TEST_P(ContextParallelThreads, SumInTheDtypeOfSums) {
  const auto [ranks, causal] = GetParam();
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    const AttentionInputs narrow = make_attention_inputs(ring_case(ranks, causal), {at::kCPU, dtype});
    const at::Tensor grad = at::randn(narrow.q.sizes(), at::kFloat).to(dtype);
    const AttentionInputs wide = attention_leaves(in_float64(narrow));
    const TensorList expected = everything(wide, attend(wide), grad.to(at::kDouble));
    const TensorList actual = everything_of_ring(narrow, grad, ranks, causal);
    // Sums of float32 are of dozens of terms.
    const double u = unit_roundoff(dtype) * (dtype == at::kFloat ? 8 : 1);
    const double bounds[] = {0.8 * u, 2 * u, 2 * u, 2 * u, 0.01};
    for (size_t i = 0; i < actual.size(); ++i) {
      EXPECT_LE(relative_error(actual[i], expected[i]), bounds[i]) << "result " << i << ", " << dtype;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All,
    ContextParallelThreads,
    ::testing::Combine(::testing::Values(2, 3, 5, 8), ::testing::Bool()),
    [](const auto& test) {
      return std::to_string(std::get<0>(test.param)) + (std::get<1>(test.param) ? "RanksCausal" : "RanksSymmetric");
    });

/// The log-sum-exp of every part is minus infinity, and so is that of all.
TEST(ContextParallelAlibiAttention, RowsWithScoresOfMinusInfinityAloneAreZero) {
  for_each_rank(2, at::kCPU, [](const Group& group) {
    AttentionInputs in = make_attention_inputs(shard(), {at::kCPU, at::kFloat});
    in.q = in.q.abs() + 1;
    in.k = at::full_like(in.k, -std::numeric_limits<double>::infinity());
    const at::Tensor out = context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group);
    EXPECT_TRUE(out.eq(0).all().item<bool>()) << out;
  });
}

/// No call of attention is made then, and nothing is sent.
TEST(ContextParallelAlibiAttention, WithoutQueryHeadsTheGradientsOfKeysAreZero) {
  for_each_rank(2, at::kCPU, [](const Group& group) {
    AttentionInputs in = make_attention_inputs(shard(), {at::kCPU, at::kFloat});
    in.q = in.q.narrow(2, 0, 0);
    in.slopes = in.slopes.narrow(0, 0, 0);
    in = attention_leaves(in);
    const at::Tensor out = context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group);
    const TensorList results = gradients({out}, {in.q, in.k, in.v, in.slopes}, {at::zeros_like(out)});
    EXPECT_EQ(results[0].sizes(), in.q.sizes());
    EXPECT_TRUE(results[1].equal(at::zeros_like(in.k)));
    EXPECT_TRUE(results[2].equal(at::zeros_like(in.v)));
    EXPECT_EQ(results[3].sizes(), in.slopes.sizes());
  });
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

TEST(ContextParallelAlibiAttention, RefusesSlopesInTheOptionsToo) {
  const AttentionInputs in = make_attention_inputs(shard(), {at::kCPU, at::kFloat});
  const auto options = ContextParallelAttentionOptions().slopes(in.slopes);
  expect_error(
      [&] { context_parallel_alibi_attention(in.q, in.k, in.v, in.slopes, group_of(1), options); },
      {"posenc::context_parallel_alibi_attention: expected options without slopes", "got slopes in both"});
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
            {"slopes of shape [Hq] = [4] or [B, Hq] = [2, 4], got [2]"}}),
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
