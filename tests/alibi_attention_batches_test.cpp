#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <numeric>

// Packed sequences of various distributions of lengths: results, and memory that is proportional to the tokens.
namespace posenc::test {
namespace {

/// Lengths of the sequences of a packed call.
struct Lengths {
  const char* name;
  std::vector<int64_t> q, k;  // empty k: the lengths of q
};

std::vector<int64_t> cumulated(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> result{0};
  std::partial_sum(lengths.begin(), lengths.end(), std::back_inserter(result));
  return result;
}

std::vector<int64_t> joined(std::vector<int64_t> a, const std::vector<int64_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// Distributions of lengths. For some, padding to the longest sequence would need many times the tokens.
std::vector<Lengths> distributions() {
  const std::vector<int64_t> ones(40, 1);
  const std::vector<int64_t> none(30, 0);
  return {
      {"Alike", {16, 16, 16}, {}},
      {"OneLongManyShort", joined({100}, ones), {}},
      {"ManyShortOneLong", joined(ones, {100}), {}},
      {"OneLongManyEmpty", joined(none, joined({90}, none)), {}},
      {"EveryLength", {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 2, 1, 0, 3}, {}},
      {"OfOtherKeys", joined({20, 0, 1, 60, 2}, ones), joined({3, 5, 70, 60, 0}, ones)},
      {"OneQueryEach", ones, joined({128}, std::vector<int64_t>(39, 3))},
  };
}

AttentionInputs packed_inputs(const Lengths& lengths, bool causal, bool slopes_of_sequences, const Target& target) {
  AttentionCase c;
  c.slopes_of_sequences = slopes_of_sequences;
  c.causal = causal;
  c.cu_seqlens_q = cumulated(lengths.q);
  c.q_len = c.cu_seqlens_q.back();
  c.k_len = c.q_len;
  if (!lengths.k.empty()) {
    c.cu_seqlens_k = cumulated(lengths.k);
    c.k_len = c.cu_seqlens_k.back();
  }
  return make_attention_inputs(c, target);
}

class AlibiAttentionPacked : public ::testing::TestWithParam<std::tuple<at::DeviceType, Lengths>> {
 protected:
  void SetUp() override { require_device(std::get<0>(GetParam())); }
};

TEST_P(AlibiAttentionPacked, EqualsItsSequencesOneByOne) {
  const auto& [device, lengths] = GetParam();
  const std::vector<int64_t>& k_lengths = lengths.k.empty() ? lengths.q : lengths.k;
  for (const auto& [causal, slopes_of_sequences] :
       std::vector<std::pair<bool, bool>>{{false, false}, {true, false}, {true, true}}) {
    AttentionInputs in = packed_inputs(lengths, causal, slopes_of_sequences, {device, at::kDouble});
    in.slopes = in.slopes.to(at::kDouble);
    in = attention_leaves(in);
    const auto [out, lse] = attend_with_lse(in);
    const at::Tensor visible_lse = lse.masked_fill(lse.detach().isinf(), 0);
    const TensorList cotangents = random_like({out, visible_lse});
    const TensorList found =
        gradients({out, visible_lse}, {in.q, in.k, in.v, in.slopes}, cotangents, /*create_graph=*/true);
    const TensorList second = gradients(found, {in.q, in.k, in.v, in.slopes}, found);
    TensorList outs, lses;
    int64_t q_begin = 0;
    int64_t k_begin = 0;
    for (size_t n = 0; n < lengths.q.size(); ++n) {
      const auto part = [](const at::Tensor& x, int64_t begin, int64_t length) {
        return x.narrow(0, begin, length).unsqueeze(0);
      };
      const auto [one, one_lse] = alibi_attention_with_lse(
          part(in.q, q_begin, lengths.q[n]), part(in.k, k_begin, k_lengths[n]), part(in.v, k_begin, k_lengths[n]),
          slopes_of_sequences ? in.slopes[static_cast<int64_t>(n)] : in.slopes, ALiBiAttentionOptions().causal(causal));
      outs.push_back(one[0]);
      lses.push_back(one_lse[0]);
      q_begin += lengths.q[n];
      k_begin += k_lengths[n];
    }
    const at::Tensor all_lse = at::cat(lses, 1);
    const TensorList expected{at::cat(outs, 0), all_lse.masked_fill(all_lse.detach().isinf(), 0)};
    const TensorList expected_found =
        gradients(expected, {in.q, in.k, in.v, in.slopes}, cotangents, /*create_graph=*/true);
    const TensorList expected_second = gradients(expected_found, {in.q, in.k, in.v, in.slopes}, expected_found);
    const auto expect_equal = [](const TensorList& actual, const TensorList& wanted) {
      for (size_t i = 0; i < wanted.size(); ++i) {
        const at::Tensor size = wanted[i].detach().abs().cpu() + 1;
        expect_within(actual[i].detach().cpu(), wanted[i].detach().cpu(), size * 1e-12);
      }
    };
    expect_equal({out, visible_lse}, expected);
    expect_equal(found, expected_found);
    expect_equal(second, expected_second);
  }
}

std::string packed_name(const ::testing::TestParamInfo<std::tuple<at::DeviceType, Lengths>>& info) {
  return std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiAttentionPacked,
    ::testing::Combine(::testing::Values(at::kCPU), ::testing::ValuesIn(distributions())),
    packed_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiAttentionPacked,
    ::testing::Combine(::testing::Values(at::kCUDA), ::testing::ValuesIn(distributions())),
    packed_name);

/// Bytes of tensors on all devices, as the allocators report them to this thread.
class MemoryMeter : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(
      void* /*ptr*/,
      int64_t alloc_size,
      size_t /*total_allocated*/,
      size_t /*total_reserved*/,
      c10::Device /*device*/) override {
    held_ += alloc_size;
    peak_ = std::max(peak_, held_);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t peak() const { return peak_; }

 private:
  int64_t held_ = 0;
  int64_t peak_ = 0;
};

/// Peak bytes of a forward and a backward pass, without the arguments. Autograd propagates the meter to its threads.
int64_t peak_of_both_passes(const AttentionInputs& in) {
  const auto meter = std::make_shared<MemoryMeter>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, meter);
  const AttentionInputs leaves = attention_leaves(in);
  const at::Tensor out = attend(leaves);
  gradients({out}, {leaves.q, leaves.k, leaves.v, leaves.slopes}, {at::ones_like(out)});
  return meter->peak();
}

class AlibiAttentionPackedMemory : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cpu, AlibiAttentionPackedMemory, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, AlibiAttentionPackedMemory, ::testing::Values(at::kCUDA), device_name);

TEST_P(AlibiAttentionPackedMemory, GrowsWithTheTokensWhateverTheirDistribution) {
  constexpr int64_t kTokens = 2048;
  const auto peak_of = [&](const std::vector<int64_t>& lengths) {
    AttentionCase c;
    c.q_heads = c.k_heads = 2;
    c.head_dim = 64;
    c.causal = true;
    c.cu_seqlens_q = cumulated(lengths);
    c.q_len = c.k_len = c.cu_seqlens_q.back();
    return peak_of_both_passes(make_attention_inputs(c, {GetParam(), at::kFloat}));
  };
  const int64_t alike = peak_of(std::vector<int64_t>(16, kTokens / 16));
  // On a GPU the batch of padded length L has at least 2 T / L entries for T tokens, the largest possible number of
  // sequences longer than L / 2, rounded up by at most a quarter. The results are additional.
  const double factor = GetParam() == at::kCPU ? 1.5 : 4;
  const auto expect_bounded = [&](const char* name, const std::vector<int64_t>& lengths) {
    EXPECT_LE(static_cast<double>(peak_of(lengths)), factor * static_cast<double>(alike)) << name;
  };
  const std::vector<int64_t> ones(kTokens / 2, 1);
  expect_bounded("short", std::vector<int64_t>(kTokens, 1));
  expect_bounded("one of 256 and short", joined({256}, joined(ones, ones)));
  expect_bounded(
      "one of 256 and empty", joined(std::vector<int64_t>(14, 128), joined({256}, std::vector<int64_t>(4096, 0))));
}

}  // namespace
}  // namespace posenc::test
