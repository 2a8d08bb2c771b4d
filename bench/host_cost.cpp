#include "cases.h"

#include <posenc/alibi.h>
#include <posenc/alibi_attention.h>
#include <posenc/frequencies.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <tuple>

namespace posenc::bench {
namespace {

/// q, k and their tables, so small that the device keeps up with the host.
struct TinyProblem {
  static constexpr int kCallsPerBatch = 400;

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
  /// q and k that require gradients.
  at::Tensor q_leaf;
  at::Tensor k_leaf;
  /// Second operand of `at::mul`. Like a table of cosines it broadcasts over heads and requires no gradient.
  at::Tensor factor;
  at::Tensor cos;
  at::Tensor sin;
  RotaryEmbedding rope{nullptr};
};

/// Inputs of the smallest attention that is fused on a GPU.
struct TinyAttention {
  // A forward and a backward pass are about 8 kernels, and a stream's queue holds about 1000.
  static constexpr int kCallsPerBatch = 100;

  explicit TinyAttention(c10::Device device) {
    constexpr int64_t kSequence = 64;
    constexpr int64_t kHeads = 2;
    constexpr int64_t kHeadDim = 64;
    const auto dtype = device.is_cuda() ? at::kBFloat16 : at::kFloat;
    const auto options = at::TensorOptions().dtype(dtype).device(device);
    for (at::Tensor* tensor : {&q, &k, &v, &gradient}) {
      *tensor = at::randn({1, kSequence, kHeads, kHeadDim}, options);
    }
    q_leaf = q.clone().requires_grad_();
    k_leaf = k.clone().requires_grad_();
    v_leaf = v.clone().requires_grad_();
    slopes = alibi_slopes(kHeads).to(device);
  }

  at::Tensor attend() const { return alibi_attention(q, k, v, slopes, causal); }

  at::Tensor attend_autograd() const { return alibi_attention(q_leaf, k_leaf, v_leaf, slopes, causal); }

  /// LibTorch's attention, without a bias.
  at::Tensor library_autograd() const {
    return at::scaled_dot_product_attention(
               q_leaf.transpose(1, 2), k_leaf.transpose(1, 2), v_leaf.transpose(1, 2), /*attn_mask=*/{},
               /*dropout_p=*/0, /*is_causal=*/true)
        .transpose(1, 2);
  }

  void differentiate(const at::Tensor& output) const {
    torch::autograd::grad({output}, {q_leaf, k_leaf, v_leaf}, {gradient});
  }

  at::Tensor q, k, v, gradient, slopes;
  /// q, k and v that require gradients.
  at::Tensor q_leaf, k_leaf, v_leaf;
  ALiBiAttentionOptions causal = ALiBiAttentionOptions().causal(true);
};

/// Host seconds per call. The call frees its results and their autograd graph, as a training step does soon after.
/// @param calls_per_batch  large enough that the clock's resolution does not matter, and small enough that all kernels
///   fit into a stream's queue of about 1000: the host never waits.
Timing time_call(Device& device, int calls_per_batch, const Work& call) {
  return measure([&] {
    device.synchronize();
    const double start = now();
    for (int i = 0; i < calls_per_batch; ++i) {
      call();
    }
    return (now() - start) / calls_per_batch;
  });
}

template <typename Problem>
void add_call(Suite& suite, Device& device, const HostCall& described, void (*call)(Problem&)) {
  suite.add(described, [&device, call] {
    Problem problem(device.torch_device());
    return time_call(device, Problem::kCallsPerBatch, [&] { call(problem); });
  });
}

void add_attention(Suite& suite, Device& device) {
  const auto add = [&](const char* id, const char* title, void (*call)(TinyAttention&)) {
    add_call(suite, device, {id, title}, call);
  };
  add("attention_autograd", "`at::scaled_dot_product_attention`, autograd",
      [](TinyAttention& p) { p.library_autograd(); });
  add("attention_step", "`at::scaled_dot_product_attention`, forward and backward",
      [](TinyAttention& p) { p.differentiate(p.library_autograd()); });
  add("alibi_attention", "`alibi_attention`", [](TinyAttention& p) { p.attend(); });
  add("alibi_attention_autograd", "`alibi_attention`, autograd", [](TinyAttention& p) { p.attend_autograd(); });
  add("alibi_attention_step", "`alibi_attention`, forward and backward",
      [](TinyAttention& p) { p.differentiate(p.attend_autograd()); });
  suite.add(HostDifference{
      "backward of `at::scaled_dot_product_attention`, with the hand-over to the thread of the device",
      "attention_step", "attention_autograd"});
  suite.add(HostDifference{
      "backward of `alibi_attention`, with the hand-over to the thread of the device", "alibi_attention_step",
      "alibi_attention_autograd"});
}

}  // namespace

void add_host_cost(Suite& suite, Device& device) {
  const auto add = [&](const char* id, const char* title, void (*call)(TinyProblem&)) {
    add_call(suite, device, {id, title}, call);
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
  if (device.torch_device().is_cuda()) {
    add_attention(suite, device);  // on a CPU a call includes the computation
  }
}

}  // namespace posenc::bench
