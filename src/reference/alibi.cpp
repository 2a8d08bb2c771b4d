#include <posenc/reference.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

namespace posenc::reference {
namespace {

using at::Tensor;

at::ScalarType wide_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

/// The position of each query minus the position of each key: `[Sq, Sk]`, int64.
Tensor differences(
    int64_t q_len,
    int64_t k_len,
    const std::optional<int64_t>& query_offset,
    const c10::Device& device) {
  const auto options = at::TensorOptions(at::kLong).device(device);
  const Tensor queries = at::arange(q_len, options) + query_offset.value_or(k_len - q_len);
  return queries.unsqueeze(1) - at::arange(k_len, options);
}

/// The bias in the dtype of sums.
Tensor wide_bias(
    const Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    at::ScalarType dtype,
    const std::optional<int64_t>& query_offset) {
  const Tensor difference = differences(q_len, k_len, query_offset, slopes.device());
  const Tensor bias = slopes.to(wide_dtype(dtype)).view({-1, 1, 1}) * -difference.abs().to(wide_dtype(dtype));
  return causal ? bias.masked_fill(difference < 0, -std::numeric_limits<double>::infinity()) : bias;
}

}  // namespace

Tensor alibi_bias(
    const Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal,
    at::ScalarType dtype,
    std::optional<int64_t> query_offset) {
  return wide_bias(slopes, q_len, k_len, causal, dtype, query_offset).to(dtype);
}

Tensor alibi_add(const Tensor& scores, const Tensor& slopes, bool causal, std::optional<int64_t> query_offset) {
  const auto dtype = scores.scalar_type();
  const Tensor bias = wide_bias(slopes, scores.size(-2), scores.size(-1), causal, dtype, query_offset);
  Tensor sum = scores.to(wide_dtype(dtype)) + bias;
  if (causal) {  // hides scores that are NaN too
    const Tensor difference = differences(scores.size(-2), scores.size(-1), query_offset, scores.device());
    sum = sum.masked_fill(difference < 0, -std::numeric_limits<double>::infinity());
  }
  return sum.to(dtype);
}

Tensor alibi_softmax(
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    bool causal,
    const std::optional<Tensor>& key_padding_mask,
    std::optional<int64_t> query_offset) {
  const auto dtype = scores.scalar_type();
  const int64_t q_len = scores.size(-2);
  const int64_t k_len = scores.size(-1);
  const Tensor bias = wide_bias(slopes, q_len, k_len, /*causal=*/false, dtype, query_offset);
  const Tensor logits = scores.to(wide_dtype(dtype)) * scale + bias;
  const Tensor difference = differences(q_len, k_len, query_offset, scores.device());
  Tensor hidden = causal ? difference < 0 : at::zeros_like(difference, at::kBool);
  if (key_padding_mask.has_value()) {
    const Tensor padding = key_padding_mask->unsqueeze(1).unsqueeze(1);
    hidden = hidden.logical_or(scores.dim() == 4 ? padding : padding.squeeze(0));
  }
  const Tensor masked = logits.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  const Tensor sees_nothing = hidden.all(-1, /*keepdim=*/true);
  // The softmax of a row without a visible key would be 0 / 0. Its logits are made finite, and its result zero.
  return at::softmax(masked.masked_fill(sees_nothing, 0), -1).masked_fill(sees_nothing, 0).to(dtype);
}

}  // namespace posenc::reference
