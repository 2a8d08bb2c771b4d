#include "cases.h"

#include <posenc/frequencies.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

#include <memory>
#include <tuple>

namespace posenc::bench {
namespace {

/// q, k and their tables, too small for the device to fall behind the host.
struct TinyProblem {
  explicit TinyProblem(c10::Device device) {
    constexpr int64_t kSequence = 8;
    constexpr int64_t kHeadDim = 64;
    const auto dtype = device.is_cuda() ? at::kHalf : at::kFloat;
    const auto options = at::TensorOptions().dtype(dtype).device(device);
    q = at::randn({1, kSequence, 4, kHeadDim}, options);
    k = at::randn({1, kSequence, 4, kHeadDim}, options);
    factor = at::randn({1, kSequence, 1, kHeadDim}, options);
    q_leaf = q.clone().requires_grad_();
    k_leaf = k.clone().requires_grad_();
    std::tie(cos, sin) = rotary_tables(rotary_inv_freq(kHeadDim), kSequence);
    cos = cos.to(device);
    sin = sin.to(device);
    rope = RotaryEmbedding(RotaryEmbeddingOptions(kHeadDim).max_position_embeddings(kSequence));
  }

  at::Tensor q;
  at::Tensor k;
  /// The same with gradients required.
  at::Tensor q_leaf;
  at::Tensor k_leaf;
  /// What a table of cosines is to tensor code: it broadcasts over heads and needs no gradient.
  at::Tensor factor;
  at::Tensor cos;
  at::Tensor sin;
  RotaryEmbedding rope{nullptr};
};

/// Host seconds of one call. Results and their graphs die within the call, as most of a training step's do soon after.
Timing time_call(Device& device, const Work& call) {
  // Long against the clock's resolution, and with a kernel a call or two still shorter than a stream's queue, so that
  // the host never waits for room in it.
  constexpr int kCallsPerBatch = 400;
  return measure([&] {
    device.synchronize();
    const double start = now();
    for (int i = 0; i < kCallsPerBatch; ++i) {
      call();
    }
    return (now() - start) / kCallsPerBatch;
  });
}

}  // namespace

void add_host_cost(Suite& suite, Device& device) {
  using Call = void (*)(TinyProblem&);
  const auto add = [&](const char* id, const char* title, Call call) {
    suite.add(HostCall{id, title}, [&device, call] {
      TinyProblem problem(device.torch_device());
      return time_call(device, [&] { call(problem); });
    });
  };
  add("mul", "`at::mul`", [](TinyProblem& p) { at::mul(p.q, p.factor); });
  add("mul_autograd", "`at::mul`, autograd", [](TinyProblem& p) { at::mul(p.q_leaf, p.factor); });
  add("two_mul_autograd", "two `at::mul`, autograd", [](TinyProblem& p) {
    at::mul(p.q_leaf, p.factor);
    at::mul(p.k_leaf, p.factor);
  });
  add("rotary_embedding_qk", "`rotary_embedding_qk`",
      [](TinyProblem& p) { rotary_embedding_qk(p.q, p.k, p.cos, p.sin); });
  add("rotary_embedding_qk_autograd", "`rotary_embedding_qk`, autograd",
      [](TinyProblem& p) { rotary_embedding_qk(p.q_leaf, p.k_leaf, p.cos, p.sin); });
  add("RotaryEmbedding_autograd", "`RotaryEmbedding::forward`, autograd",
      [](TinyProblem& p) { p.rope->forward(p.q_leaf, p.k_leaf); });
  suite.add(HostDifference{
      "`rotary_embedding_qk` minus two `at::mul`, autograd", "rotary_embedding_qk_autograd", "two_mul_autograd"});
  suite.add(HostDifference{
      "`RotaryEmbedding::forward` minus `rotary_embedding_qk`, autograd", "RotaryEmbedding_autograd",
      "rotary_embedding_qk_autograd"});
}

}  // namespace posenc::bench
