#include "alibi_attention_support.h"
#include "context_parallel_support.h"
#include "gradcheck.h"

#include <posenc/positions.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#ifdef USE_DISTRIBUTED
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#endif

#include <mutex>

namespace posenc::test {
namespace {

#ifdef USE_DISTRIBUTED

// Ranks are threads that share one GPU. NCCL with a GPU for each rank: tests/python/context_parallel_test.py.

/// Calls an operator of posenc.
TensorList call(const char* name, std::vector<c10::IValue> arguments) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(arguments);
  TensorList results;
  for (const c10::IValue& value : arguments) {
    results.push_back(value.toTensor());
  }
  return results;
}

/// Output and gradients of q, k, v and slopes of a call over `ranks` ranks, put together.
TensorList everything_of_ring(const AttentionInputs& whole, const at::Tensor& grad, int ranks, bool causal) {
  TensorList result{at::zeros_like(whole.q)};
  for (const at::Tensor& x : {whole.q, whole.k, whole.v, whole.slopes}) {
    result.push_back(at::zeros_like(x));
  }
  std::mutex mutex;
  for_each_rank(ranks, at::kCUDA, [&](const Group& group) {
    const at::NoGradGuard no_grad;
    const std::string name = "cuda ring " + std::to_string(group->getRank());
    {
      const std::lock_guard<std::mutex> lock(mutex);
      c10d::register_process_group(name, group);
    }
    const at::Tensor tokens =
        context_parallel_positions(whole.q.size(1), group->getRank(), group->getSize()).to(at::kCUDA);
    const auto part = [&tokens](const at::Tensor& x) { return x.index_select(1, tokens); };
    const at::Tensor q = part(whole.q);
    const at::Tensor k = part(whole.k);
    const at::Tensor v = part(whole.v);
    const TensorList out =
        call("posenc::context_parallel_alibi_attention", {q, k, v, whole.slopes, name, c10::IValue(), causal});
    const TensorList gradients = call(
        "posenc::context_parallel_alibi_attention_backward",
        {part(grad), c10::IValue(), q, k, v, whole.slopes, out[0], out[1], name, c10::IValue(), causal,
         std::vector<bool>(4, true)});
    const std::lock_guard<std::mutex> lock(mutex);
    c10d::unregister_process_group(name);
    result[0].index_copy_(1, tokens, out[0]);
    for (size_t i = 1; i < 4; ++i) {
      result[i].index_copy_(1, tokens, gradients[i - 1]);
    }
    result[4] += gradients[3];
  });
  return result;
}

struct RingCase {
  int ranks;
  int64_t half_len;  // with 64 and more, cuDNN computes the 16-bit dtypes on an H100 and H200
  bool causal;
};

class ContextParallelCuda : public ::testing::TestWithParam<RingCase> {
 protected:
  void SetUp() override { require_device(at::kCUDA); }
};

/// Bounds as in ContextParallelThreads: each part of an output is rounded to its dtype, and the sum once more.
TEST_P(ContextParallelCuda, EqualsTheWholeInFloat64) {
  const RingCase& ring = GetParam();
  AttentionCase c;
  c.q_len = c.k_len = 2 * ring.half_len * ring.ranks;
  c.head_dim = 64;
  c.causal = ring.causal;
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    const AttentionInputs narrow = make_attention_inputs(c, {at::kCUDA, dtype});
    const at::Tensor grad = at::randn(narrow.q.sizes(), narrow.q.options().dtype(at::kFloat)).to(dtype);
    const AttentionInputs wide = attention_leaves(in_float64(narrow));
    const at::Tensor out = attend(wide);
    TensorList expected = gradients({out}, {wide.q, wide.k, wide.v, wide.slopes}, {grad.to(at::kDouble)});
    expected.insert(expected.begin(), out);
    const TensorList actual = everything_of_ring(narrow, grad, ring.ranks, ring.causal);
    // Sums of float32 are of hundreds of terms.
    const double u = unit_roundoff(dtype) * (dtype == at::kFloat ? 32 : 1);
    const double bounds[] = {1.5 * u, 3 * u, 3 * u, 3 * u, 0.01};
    for (size_t i = 0; i < actual.size(); ++i) {
      EXPECT_LE(relative_error(actual[i], expected[i]), bounds[i]) << "result " << i << ", " << dtype;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All,
    ContextParallelCuda,
    ::testing::Values(
        RingCase{2, 64, true},
        RingCase{2, 20, false},
        RingCase{3, 20, true},
        RingCase{4, 20, true},
        RingCase{4, 20, false}),
    [](const auto& test) {
      return std::to_string(test.param.ranks) + "RanksOf" + std::to_string(2 * test.param.half_len) +
          (test.param.causal ? "Causal" : "Symmetric");
    });

#endif

}  // namespace
}  // namespace posenc::test
