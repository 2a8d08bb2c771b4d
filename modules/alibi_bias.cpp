#include <posenc/modules/alibi_bias.h>

#include "detail/resolved_device.h"

#include <posenc/alibi.h>
#include <posenc/detail/stream_capture.h>

#include <torch/utils.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

namespace posenc {

using torch::Tensor;

/// The slopes of one set of options, float32, one copy for each device. Copies are neither replaced nor freed during
/// the lifetime of this object: kernels in flight on other streams and captured graphs may read them.
class ALiBiBiasImpl::FixedSlopes {
 public:
  explicit FixedSlopes(Tensor on_cpu) : copies_{std::move(on_cpu)} {}

  /// Whether these slopes equal `on_cpu`. Locks, because clones of a module share this object, and another clone may
  /// add a copy at the same time.
  bool serve(const Tensor& on_cpu) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return on_cpu.equal(copies_.front());
  }

  Tensor on(const torch::Device& device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found =
        std::find_if(copies_.begin(), copies_.end(), [&](const Tensor& copy) { return copy.device() == device; });
    if (found != copies_.end()) {
      return *found;
    }
    TORCH_CHECK(
        !detail::is_capturing(device), "posenc::ALiBiBias: expected the fixed slopes to be on ", device,
        " before a graph is captured, got slopes on the CPU alone during a capture; call slopes_on, or forward with "
        "scores on that device, before the capture");
    // The copy is synchronous, so that no other stream reads it before it is complete. It is not an inference tensor,
    // because a training step may use it later.
    const torch::InferenceMode no_inference(false);
    const torch::NoGradGuard no_grad;
    return copies_.emplace_back(copies_.front().to(device));
  }

 private:
  mutable std::mutex mutex_;
  std::vector<Tensor> copies_;  // one for each device, the first one on the CPU
};

namespace {

/// A copy of the slopes of the heads of a module, float32 `[num_heads]` on the CPU.
Tensor slopes_of(const ALiBiBiasOptions& options) {
  const int64_t num_heads = options.num_heads();
  const int64_t total = options.total_heads().value_or(num_heads);
  TORCH_CHECK(num_heads > 0, "posenc::ALiBiBias: expected a positive num_heads, got ", num_heads);
  TORCH_CHECK(
      options.head_offset() >= 0 && num_heads <= total && options.head_offset() <= total - num_heads,
      "posenc::ALiBiBias: expected heads head_offset to head_offset + num_heads - 1 to be among total_heads = ", total,
      ", got head_offset = ", options.head_offset(), " and num_heads = ", num_heads);
  const torch::InferenceMode no_inference(false);
  const torch::NoGradGuard no_grad;
  Tensor all;
  if (options.slopes().defined()) {
    TORCH_CHECK(
        options.slopes().dim() == 1 && options.slopes().size(0) == total && options.slopes().is_floating_point(),
        "posenc::ALiBiBias: expected slopes of a floating dtype and shape [total_heads] = [", total, "], got ",
        options.slopes().scalar_type(), " ", options.slopes().sizes());
    all = options.slopes().detach().to(torch::kCPU, torch::kFloat32);
  } else {
    all = alibi_slopes(total, options.max_bias());
  }
  return all.narrow(0, options.head_offset(), num_heads).clone();
}

}  // namespace

ALiBiBiasOptions::ALiBiBiasOptions(int64_t num_heads) : num_heads_(num_heads) {
}

ALiBiBiasImpl::ALiBiBiasImpl(ALiBiBiasOptions options_) : options(std::move(options_)) {
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as LibTorch's own modules do
  reset();
}

void ALiBiBiasImpl::reset() {
  Tensor initial = slopes_of(options);
  if (parameters_.contains("slopes")) {  // on a second call; clones have no parameters yet
    parameters_.erase("slopes");
  }
  if (options.learnable()) {
    fixed_ = nullptr;
    slopes = register_parameter("slopes", std::move(initial));
    return;
  }
  slopes = Tensor();
  // Cloneable calls reset() on every clone, which keeps the copies that it shares with the original.
  if (fixed_ == nullptr || !fixed_->serve(initial)) {
    fixed_ = std::make_shared<FixedSlopes>(std::move(initial));
  }
}

Tensor ALiBiBiasImpl::forward(const Tensor& scores) {
  return add(scores);
}

Tensor ALiBiBiasImpl::add(const Tensor& scores, std::optional<int64_t> query_offset) {
  TORCH_CHECK(scores.defined(), "posenc::ALiBiBias: expected scores to be a tensor, got an undefined one");
  return alibi_add(scores, slopes_on(scores.device()), options.causal(), query_offset);
}

Tensor ALiBiBiasImpl::bias(
    int64_t q_len,
    int64_t k_len,
    torch::Dtype dtype,
    std::optional<torch::Device> device,
    std::optional<int64_t> query_offset) {
  const torch::Device home = slopes.defined() ? slopes.device() : torch::Device(torch::kCPU);
  return alibi_bias(slopes_on(device.value_or(home)), q_len, k_len, options.causal(), dtype, query_offset);
}

Tensor ALiBiBiasImpl::softmax(
    const Tensor& scores,
    double scale,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<int64_t> query_offset) {
  TORCH_CHECK(scores.defined(), "posenc::ALiBiBias: expected scores to be a tensor, got an undefined one");
  return alibi_softmax(scores, slopes_on(scores.device()), scale, options.causal(), key_padding_mask, query_offset);
}

Tensor ALiBiBiasImpl::attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const ALiBiAttentionOptions& attention_options) {
  return std::get<0>(attention_with_lse(q, k, v, attention_options));
}

std::tuple<Tensor, Tensor> ALiBiBiasImpl::attention_with_lse(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const ALiBiAttentionOptions& attention_options) {
  TORCH_CHECK(q.defined(), "posenc::ALiBiBias: expected q to be a tensor, got an undefined one");
  TORCH_CHECK(
      options.causal() || !attention_options.causal(),
      "posenc::ALiBiBias: expected attention_options without causal in a module that is not causal, got causal");
  return alibi_attention_with_lse(
      q, k, v, slopes_on(q.device()), ALiBiAttentionOptions(attention_options).causal(options.causal()));
}

Tensor ALiBiBiasImpl::slopes_on(const torch::Device& device) {
  if (!slopes.defined()) {
    return fixed_->on(detail::resolved(device));
  }
  TORCH_CHECK(
      slopes.device() == detail::resolved(device), "posenc::ALiBiBias: expected the learnable slopes on ",
      detail::resolved(device), ", got them on ", slopes.device(), "; move the module there");
  return slopes;
}

void ALiBiBiasImpl::pretty_print(std::ostream& stream) const {
  stream << "posenc::ALiBiBias(num_heads=" << options.num_heads() << std::boolalpha << ", causal=" << options.causal();
  if (options.slopes().defined()) {
    stream << ", slopes=custom";
  } else {
    stream << ", max_bias=" << options.max_bias();
  }
  stream << ", learnable=" << options.learnable();
  if (options.total_heads().has_value()) {
    stream << ", head_offset=" << options.head_offset() << ", total_heads=" << *options.total_heads();
  }
  stream << ")";
}

}  // namespace posenc
