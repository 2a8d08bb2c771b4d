#include <posenc/reference.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>
#include <vector>

namespace posenc::reference {
namespace {

using at::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// `x`, `[B, S, H, D]`, as `[B, times * H, S, D]` in the dtype of sums, with each head repeated `times` times.
Tensor heads_first(const Tensor& x, at::ScalarType dtype, int64_t times) {
  return x.to(dtype).transpose(1, 2).repeat_interleave(times, 1);
}

std::tuple<Tensor, Tensor> padded(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options) {
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t q_len = q.size(1);
  const int64_t k_len = k.size(1);
  const auto integers = q.options().dtype(at::kLong);
  const auto lengths = [&](const std::optional<Tensor>& given, int64_t otherwise) {
    return (given.has_value() ? given->to(at::kLong) : at::zeros({1}, integers) + otherwise).view({-1, 1, 1});
  };
  const Tensor seqlens_q = lengths(options.seqlens_q(), q_len);
  const Tensor seqlens_k = lengths(options.seqlens_k(), k_len);
  const Tensor rows = at::arange(q_len, integers).view({1, -1, 1});
  const Tensor columns = at::arange(k_len, integers).view({1, 1, -1});
  const Tensor positions =
      options.query_offset().has_value() ? rows + *options.query_offset() : rows + (seqlens_k - seqlens_q);
  Tensor hidden = (columns >= seqlens_k).logical_or(rows >= seqlens_q);
  if (options.causal()) {
    hidden = hidden.logical_or(columns > positions);
  }
  if (options.window_left().has_value()) {
    hidden = hidden.logical_or(positions - columns > *options.window_left());
  }
  if (options.window_right().has_value()) {
    hidden = hidden.logical_or(columns - positions > *options.window_right());
  }
  hidden = hidden.unsqueeze(1);  // broadcasts with [B, H, Sq, Sk]
  const int64_t times = k.size(2) == 0 ? 1 : q.size(2) / k.size(2);
  const double scale = options.scale().value_or(1 / std::sqrt(static_cast<double>(q.size(3))));
  Tensor scores = at::matmul(heads_first(q, wide, 1), heads_first(k, wide, times).transpose(-1, -2)) * scale;
  if (options.softcap().has_value()) {
    scores = (scores / *options.softcap()).tanh() * *options.softcap();
  }
  if (options.slopes().has_value()) {
    const Tensor distances = (positions - columns).abs().to(wide).unsqueeze(1);
    const Tensor slopes = options.slopes()->to(wide);  // [Hq] or [B, Hq]
    scores = scores - (slopes.dim() == 1 ? slopes.unsqueeze(0) : slopes).unsqueeze(-1).unsqueeze(-1) * distances;
  }
  const Tensor sees_nothing = hidden.all(-1, /*keepdim=*/true);
  // The softmax of a row without a visible key would be 0 / 0. Its scores are made finite, and its result zero.
  if (options.sinks().has_value()) {
    // One more key, which all rows see, without a value.
    const Tensor sink = options.sinks()->to(wide).view({1, -1, 1, 1}).expand({q.size(0), q.size(2), q_len, 1});
    const Tensor logits = at::cat({scores.masked_fill(hidden, -kInfinity), sink}, -1);
    const Tensor p = at::softmax(logits, -1).narrow(-1, 0, k_len);
    const Tensor out = at::matmul(p, heads_first(v, wide, times)).transpose(1, 2).to(q.scalar_type());
    return {out, at::logsumexp(logits, -1)};
  }
  const Tensor logits = scores.masked_fill(hidden, -kInfinity).masked_fill(sees_nothing, 0);
  const Tensor p = at::softmax(logits, -1).masked_fill(sees_nothing, 0);
  const Tensor out = at::matmul(p, heads_first(v, wide, times)).transpose(1, 2).to(q.scalar_type());
  return {out, at::logsumexp(logits, -1).masked_fill(sees_nothing.squeeze(-1), -kInfinity)};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const AttentionOptions& options) {
  if (q.dim() == 4) {
    return padded(q, k, v, options);
  }
  const auto begins_of = [](const Tensor& cu_seqlens) {
    const Tensor on_cpu = cu_seqlens.to(at::kCPU, at::kLong).contiguous();
    return std::vector<int64_t>(on_cpu.data_ptr<int64_t>(), on_cpu.data_ptr<int64_t>() + on_cpu.numel());
  };
  const std::vector<int64_t> q_begins = begins_of(*options.cu_seqlens_q());
  const std::vector<int64_t> k_begins =
      options.cu_seqlens_k().has_value() ? begins_of(*options.cu_seqlens_k()) : q_begins;
  AttentionOptions of_one;
  of_one.slopes(options.slopes()).scale(options.scale()).causal(options.causal());
  of_one.window(options.window_left(), options.window_right()).softcap(options.softcap());
  of_one.sinks(options.sinks());
  const auto sums = q.options().dtype(q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  std::vector<Tensor> outs;
  std::vector<Tensor> lses;
  const auto add_tokens_of_no_sequence = [&](int64_t count) {
    outs.push_back(at::zeros({count, q.size(1), q.size(2)}, q.options()));
    const Tensor none = at::zeros({q.size(1), count}, sums);
    lses.push_back(options.sinks().has_value() ? none + options.sinks()->unsqueeze(-1) : none - kInfinity);
  };
  add_tokens_of_no_sequence(q_begins.front());
  for (size_t n = 0; n + 1 < q_begins.size(); ++n) {
    const int64_t q_len = q_begins[n + 1] - q_begins[n];
    const int64_t k_len = k_begins[n + 1] - k_begins[n];
    if (options.slopes().has_value() && options.slopes()->dim() == 2) {
      of_one.slopes(options.slopes()->narrow(0, static_cast<int64_t>(n), 1));
    }
    const auto [out, lse] = padded(
        q.narrow(0, q_begins[n], q_len).unsqueeze(0), k.narrow(0, k_begins[n], k_len).unsqueeze(0),
        v.narrow(0, k_begins[n], k_len).unsqueeze(0),
        of_one.query_offset(options.query_offset().value_or(k_len - q_len)));
    outs.push_back(out.squeeze(0));
    lses.push_back(lse.squeeze(0));
  }
  add_tokens_of_no_sequence(q.size(0) - q_begins.back());
  return {at::cat(outs, 0), at::cat(lses, 1)};
}

std::tuple<Tensor, Tensor> alibi_attention(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes,
    const ALiBiAttentionOptions& options) {
  return reference::attention(q, k, v, AttentionOptions(options).slopes(slopes));
}

}  // namespace posenc::reference
