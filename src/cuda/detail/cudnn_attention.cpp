#include <cuda/detail/cudnn_attention.h>
#include <cuda/detail/cudnn_graph.h>
#include <cuda/detail/cudnn_validation.h>
#include <cuda/detail/launch.h>

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <limits>
#include <optional>

namespace posenc::cuda {
namespace {

using at::Tensor;
using blockwise::Padded;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// cuDNN has fused attention from this compute capability on.
constexpr int kOldestMajor = 8;
constexpr int64_t kHeadDims[] = {32, 64, 80, 96, 128, 192, 256};

/// A multiple of the columns in cuDNN's tiles of scores. Without a mask of its own, cuDNN's backward pass also computes
/// the columns of the last tile beyond the keys. Their keys are zeros, but a probability that overflows makes them NaN
/// (seen with S = 448 in float16). A key limit excludes them.
constexpr int64_t kTile = 128;

/// Key limits are float32, exact up to this number.
constexpr int64_t kMaxKeys = int64_t{1} << 24;

constexpr int64_t kAlignment = 16;

struct Form {
  CudnnBias bias;
  CudnnMask mask;
  int64_t offset;
};

std::optional<Form> form_of(const Padded& call) {
  if (!call.query_offset.has_value()) {
    return std::nullopt;  // the offset differs between sequences
  }
  const int64_t offset = *call.query_offset;
  const int64_t q_len = call.q_len();
  const int64_t k_len = call.k_len();
  const bool at_the_end = offset == k_len - q_len;
  const bool hides_keys = call.causal && offset < k_len - 1;
  if (!call.slopes.defined()) {
    if (call.seqlens_q.defined() || call.seqlens_k.defined() || (hides_keys && !(at_the_end && q_len <= k_len))) {
      return std::nullopt;
    }
    const auto mask = q_len == k_len ? CudnnMask::causal : CudnnMask::causal_bottom_right;
    return Form{CudnnBias::none, hides_keys ? mask : CudnnMask::none, 0};
  }
  // A single query at the last key sees all keys, with or without a causal mask.
  if ((call.causal || q_len == 1) && at_the_end && q_len <= k_len && k_len > 1) {
    if (q_len == k_len) {
      return Form{CudnnBias::ramp, CudnnMask::causal, 0};
    }
    return Form{CudnnBias::ramp, CudnnMask::causal_bottom_right, offset};
  }
  // cuDNN returns wrong results for one row without a causal mask. With all keys before the queries the mask hides
  // none.
  if (!hides_keys && q_len > 1) {
    return Form{CudnnBias::distance, CudnnMask::none, offset};
  }
  return std::nullopt;
}

/// Whether channels are dense, all rows are aligned to 16 bytes, and strides are positive.
bool is_readable(const Tensor& x) {
  const int64_t elements = kAlignment / x.element_size();
  if (x.stride(3) != 1 || reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment != 0) {
    return false;
  }
  for (int64_t d = 0; d < 3; ++d) {
    if (x.size(d) > 1 && (x.stride(d) <= 0 || x.stride(d) % elements != 0)) {
      return false;
    }
  }
  return true;
}

bool has_row_limits(const Padded& call, const Form& form) {
  return call.seqlens_q.defined() || call.seqlens_k.defined() ||
      (form.bias == CudnnBias::distance && call.k_len() % kTile != 0);
}

/// The lengths of a padded batch as limits for each row.
struct RowLimits {
  Tensor key_limits;  // float32 [B, Sq]
  Tensor alive;       // bool [B, Sq], or undefined: all
};

RowLimits row_limits(const Padded& call, const Form& form) {
  if (!has_row_limits(call, form)) {
    return {};
  }
  const auto real = call.q.options().dtype(at::kFloat);
  if (!call.seqlens_q.defined() && !call.seqlens_k.defined()) {
    return {at::full({call.batch(), call.q_len()}, static_cast<double>(call.k_len()), real), {}};
  }
  const Tensor rows = at::arange(call.q_len(), real.dtype(at::kLong)).unsqueeze(0);
  Tensor limits = at::full({call.batch(), call.q_len()}, call.k_len(), rows.options());
  if (call.seqlens_k.defined()) {
    limits = call.seqlens_k.unsqueeze(1).expand_as(limits).clone();
  }
  if (call.seqlens_q.defined()) {
    limits.masked_fill_(rows >= call.seqlens_q.unsqueeze(1), 0);
  }
  // A row without a visible key would be NaN. It gets a limit of one key, and its results are set to zero afterwards.
  return {limits.clamp_min(1).to(at::kFloat), limits > 0};
}

CudnnGraph graph_of(const Padded& call, const Form& form, const RowLimits& limits) {
  const Tensor slopes = call.slopes.defined() ? call.slopes.contiguous() : Tensor();
  return {call.q, call.k, call.v, slopes, limits.key_limits, form.bias, form.mask, form.offset, call.scale};
}

}  // namespace

std::string why_not_cudnn(const Padded& call) {
  if (call.q.numel() == 0 || call.k.numel() == 0) {
    return "tensors are empty";
  }
  if (call.slopes.defined() && call.slopes.dim() != 1) {
    return "cuDNN was tried with one slope for each head only";
  }
  if (call.window_left.has_value() || call.window_right.has_value()) {
    return "cuDNN was tried without windows only";
  }
  if (call.softcap.has_value()) {
    return "cuDNN was tried without softcap only";
  }
  if (call.q.scalar_type() != at::kHalf && call.q.scalar_type() != at::kBFloat16) {
    return "cuDNN takes float16 and bfloat16";
  }
  if (!at::globalContext().userEnabledCuDNN()) {
    return "cuDNN is switched off (at::globalContext().setUserEnabledCuDNN)";
  }
  if (const std::string& reason = why_no_cudnn_graphs(); !reason.empty()) {
    return reason;
  }
  if (at::cuda::getCurrentDeviceProperties()->major < kOldestMajor) {
    return "cuDNN's attention needs compute capability 8.0 or later";
  }
  if (std::find(std::begin(kHeadDims), std::end(kHeadDims), call.head_dim()) == std::end(kHeadDims)) {
    return "the head size is none of 32, 64, 80, 96, 128, 192 and 256";
  }
  if (!is_readable(call.q) || !is_readable(call.k) || !is_readable(call.v)) {
    return "cuDNN takes dense channels and 16-byte aligned rows";
  }
  if (call.batch() > kMaxGridY || call.q_heads() > kMaxGridY) {
    return "there are more than 65,535 sequences or heads";
  }
  const std::optional<Form> form = form_of(call);
  if (call.k_len() >= kMaxKeys || !form.has_value()) {
    return "cuDNN takes no such positions of queries";
  }
  return why_not_used(
      {call.q.scalar_type(), call.head_dim(), form->bias, form->mask, form->offset != 0, has_row_limits(call, *form),
       call.q_heads() != call.k_heads(), at::globalContext().deterministicAlgorithms()});
}

std::tuple<Tensor, Tensor> cudnn_attention(const Padded& call) {
  const Form form = form_of(call).value();
  const RowLimits limits = row_limits(call, form);
  auto [out, lse] = run_cudnn_forward(graph_of(call, form, limits));
  if (limits.alive.defined()) {
    // Zero for rows without a visible key, NaN if a length is beyond its tensor.
    Tensor factor = limits.alive.to(out.scalar_type());
    lse.masked_fill_(limits.alive.logical_not().unsqueeze(1), -kInfinity);
    if (call.nan_if_too_long.defined()) {
      factor.add_(call.nan_if_too_long.unsqueeze(1));
      lse.add_(call.nan_if_too_long.view({-1, 1, 1}));
    }
    out.mul_(factor.unsqueeze(-1).unsqueeze(-1));
  }
  return {out, lse};
}

Tensor readable_rows(const Padded& call, const Tensor& x) {
  return is_readable(x) ? x : at::empty_like(call.q).copy_(x);
}

std::tuple<Tensor, Tensor, Tensor> cudnn_attention_backward(
    const Padded& call,
    const Tensor& grad_out,
    const Tensor& out,
    const Tensor& lse) {
  const Form form = form_of(call).value();
  const RowLimits limits = row_limits(call, form);
  // exp(score - infinity) is 0: rows without a visible key contribute nothing.
  const Tensor sums = limits.alive.defined() ? lse.masked_fill(lse == -kInfinity, kInfinity) : lse;
  return run_cudnn_backward(graph_of(call, form, limits), grad_out, out, sums.contiguous());
}

}  // namespace posenc::cuda
