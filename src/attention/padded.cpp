#include <attention/padded.h>
#include <contract/alibi.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <vector>

namespace posenc::attention {
namespace {

using at::Tensor;

/// A mask of the leading dimensions, for a tensor of more.
Tensor over_trailing(const Tensor& mask, int64_t dim) {
  Tensor result = mask;
  while (result.dim() < dim) {
    result = result.unsqueeze(-1);
  }
  return result;
}

/// Lengths outside of a tensor, which nobody could refuse where the host does not see them.
Tensor beyond(const Tensor& seqlens, int64_t most) {
  return (seqlens < 0).logical_or_(seqlens > most);
}

}  // namespace

Packing::Packing(const Tensor& cu_seqlens, int64_t tokens, int64_t max_len) : tokens_(tokens), max_len_(max_len) {
  const Tensor begins = cu_seqlens.to(at::kLong);
  const int64_t sequences = begins.size(0) - 1;
  const Tensor first = begins.narrow(0, 0, sequences);
  const Tensor last = begins.narrow(0, 1, sequences);
  seqlens_ = last - first;
  broken_ = beyond(seqlens_, max_len).logical_or_(first < 0).logical_or_(last > tokens);
  const Tensor rows = at::arange(max_len, begins.options());
  sources_ = (first.unsqueeze(1) + rows).clamp_(0, std::max<int64_t>(0, tokens - 1)).view(-1);
  behind_ = rows >= seqlens_.unsqueeze(1);
  const Tensor all = at::arange(tokens, begins.options());
  outside_ = (all < begins.select(0, 0)).logical_or_(all >= begins.select(0, sequences));
  if (sequences > 0 && max_len > 0) {
    const Tensor sequence =
        at::searchsorted(last.contiguous(), all, /*out_int32=*/false, /*right=*/true).clamp_(0, sequences - 1);
    destinations_ = (all - first.index_select(0, sequence)).clamp_(0, max_len - 1).add_(sequence, max_len);
  }
}

Tensor Packing::pad(const Tensor& packed) const {
  std::vector<int64_t> sizes = packed.sizes().vec();
  sizes[0] = max_len_;
  sizes.insert(sizes.begin(), seqlens_.size(0));
  if (tokens_ == 0) {
    return at::zeros(sizes, packed.options());
  }
  return packed.index_select(0, sources_).view(sizes).masked_fill_(over_trailing(behind_, packed.dim() + 1), 0);
}

Tensor Packing::unpad(const Tensor& padded, double fill) const {
  std::vector<int64_t> sizes = padded.sizes().slice(1).vec();
  sizes[0] = tokens_;
  if (!destinations_.defined()) {
    return at::zeros(sizes, padded.options()).fill_(fill);
  }
  return padded.flatten(0, 1)
      .index_select(0, destinations_)
      .masked_fill_(over_trailing(outside_, padded.dim() - 1), fill);
}

PaddedCall::PaddedCall(
    const contract::AlibiAttention& call,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& slopes) {
  Tensor broken;
  if (call.packed()) {
    of_q_.emplace(call.cu_seqlens_q, q.size(0), call.q_len);
    of_k_.emplace(call.cu_seqlens_k, k.size(0), call.k_len);
    padded_.q = of_q_->pad(q);
    padded_.k = of_k_->pad(k);
    padded_.v = of_k_->pad(v);
    padded_.seqlens_q = of_q_->seqlens();
    padded_.seqlens_k = of_k_->seqlens();
    broken = of_q_->broken().logical_or(of_k_->broken());
  } else {
    padded_.q = q;
    padded_.k = k;
    padded_.v = v;
    for (const auto& [seqlens, target, most] :
         {std::tuple(&call.seqlens_q, &padded_.seqlens_q, call.q_len),
          std::tuple(&call.seqlens_k, &padded_.seqlens_k, call.k_len)}) {
      if (seqlens->defined()) {
        *target = seqlens->to(at::kLong);
        const Tensor wrong = beyond(*target, most);
        broken = broken.defined() ? broken.logical_or_(wrong) : wrong;
      }
    }
  }
  // The contract has read what lies on the CPU.
  if (broken.defined() && !broken.is_cpu()) {
    const auto wide = q.options().dtype(contract::alibi_slopes_dtype(q.scalar_type()));
    padded_.poison = at::zeros({call.batch}, wide).masked_fill_(broken, std::numeric_limits<double>::quiet_NaN());
  }
  padded_.slopes = slopes;
  padded_.query_offset = call.query_offset;
  padded_.scale = call.scale;
  padded_.causal = call.causal;
}

Tensor PaddedCall::pad_q(const Tensor& x) const {
  return of_q_.has_value() ? of_q_->pad(x) : x;
}

Tensor PaddedCall::pad_lse(const Tensor& x) const {
  return of_q_.has_value() ? of_q_->pad(x.t()).transpose(1, 2) : x;
}

Tensor PaddedCall::unpad_q(const Tensor& x) const {
  return of_q_.has_value() ? of_q_->unpad(x) : x;
}

Tensor PaddedCall::unpad_k(const Tensor& x) const {
  return of_k_.has_value() ? of_k_->unpad(x) : x;
}

Tensor PaddedCall::unpad_lse(const Tensor& x, double fill) const {
  return of_q_.has_value() ? of_q_->unpad(x.transpose(1, 2), fill).t() : x;
}

}  // namespace posenc::attention
