#include <posenc/modules/qk_norm_rotary_embedding.h>

#include "detail/layout.h"

#include <posenc/qk_norm_rotary_embedding.h>

#include <torch/utils.h>

#include <cmath>
#include <utility>

namespace posenc {

using torch::Tensor;

namespace {

constexpr const char* kQKNormName = "posenc::QKNormRotaryEmbedding";

}  // namespace

QKNormRotaryEmbeddingOptions::QKNormRotaryEmbeddingOptions(int64_t head_dim)
    : QKNormRotaryEmbeddingOptions(RotaryEmbeddingOptions(head_dim)) {
}

QKNormRotaryEmbeddingOptions::QKNormRotaryEmbeddingOptions(RotaryEmbeddingOptions rotary) : rotary_(std::move(rotary)) {
}

QKNormRotaryEmbeddingImpl::QKNormRotaryEmbeddingImpl(QKNormRotaryEmbeddingOptions options_)
    : options(std::move(options_)) {
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as LibTorch's own modules do
  reset();
}

void QKNormRotaryEmbeddingImpl::reset() {
  TORCH_CHECK(
      options.eps() > 0 && std::isfinite(options.eps()), kQKNormName, ": expected a positive, finite eps, got ",
      options.eps());
  RotaryEmbedding rotation(options.rotary());  // checks its options
  if (named_children().contains("rotary")) {   // on a second call; clones have no children yet
    unregister_module("rotary");
    parameters_.erase("q_weight");
    parameters_.erase("k_weight");
  }
  rotary = register_module("rotary", std::move(rotation));
  const torch::InferenceMode no_inference(false);
  const auto initial = [this] { return torch::full({options.rotary().head_dim()}, options.unit_offset() ? 0.0 : 1.0); };
  q_weight = register_parameter("q_weight", initial());
  k_weight = register_parameter("k_weight", initial());
}

std::tuple<Tensor, Tensor> QKNormRotaryEmbeddingImpl::forward(
    const Tensor& q,
    const Tensor& k,
    const std::optional<Tensor>& positions,
    std::optional<int64_t> seq_len) {
  const RotaryEmbeddingOptions& rotation = rotary->options;
  detail::check_input(kQKNormName, "q", q, rotation);
  detail::check_input(kQKNormName, "k", k, rotation);
  const Tensor q_view = detail::reordered(q, rotation.layout());
  const auto [cos, sin] = rotary->tables_for(q_view, positions, seq_len);
  auto [q_out, k_out] = qk_norm_rotary_embedding(
      q_view, detail::reordered(k, rotation.layout()), q_weight, k_weight, cos, sin, positions, options.eps(),
      options.unit_offset(), rotation.interleaved(), rotation.conjugate(), rotary->axes_for(positions));
  return {detail::reordered(q_out, rotation.layout()), detail::reordered(k_out, rotation.layout())};
}

void QKNormRotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "posenc::QKNormRotaryEmbedding(head_dim=" << options.rotary().head_dim() << ", eps=" << options.eps()
         << std::boolalpha << ", unit_offset=" << options.unit_offset() << ")";
}

}  // namespace posenc
