#include <blockwise/batches.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <map>
#include <utility>

namespace posenc::blockwise {
namespace {

using at::Tensor;

/// Appends dimensions of size 1 to `mask` until it has `dim` dimensions.
Tensor over_trailing(const Tensor& mask, int64_t dim) {
  Tensor result = mask;
  while (result.dim() < dim) {
    result = result.unsqueeze(-1);
  }
  return result;
}

/// The least n with `2^n >= length`.
int64_t log2_ceil(int64_t length) {
  int64_t n = 0;
  while ((int64_t{1} << n) < length) {
    ++n;
  }
  return n;
}

/// Rounds `x` up by at most a quarter. cuDNN builds a plan for each number of entries, so few numbers should occur.
int64_t round_up(int64_t x) {
  int64_t unit = 1;
  while (x / unit >= 8) {
    unit *= 2;
  }
  return (x + unit - 1) / unit * unit;
}

/// Padded length of the shortest sequences on a GPU. cuDNN attention is not used for one query and one key.
constexpr int64_t kShortest = 2;

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// Packing

Packing::Packing(const Tensor& begins, const Tensor& lengths, const Tensor& rows, int64_t max_len)
    : max_len_(max_len), seqlens_(lengths) {
  const int64_t tokens = rows.size(0);
  is_whole_ = rows.is_cpu() && lengths.size(0) == 1 && max_len == tokens && lengths.item<int64_t>() == tokens;
  if (is_whole_) {
    return;
  }
  const Tensor offsets = at::arange(max_len, begins.options());
  sources_ = (begins.unsqueeze(1) + offsets).clamp_(0, std::max<int64_t>(0, tokens - 1)).view(-1);
  behind_ = offsets >= lengths.unsqueeze(1);
  if (rows.is_cpu()) {
    tokens_ = at::nonzero(rows >= 0).squeeze(1);
    rows_ = rows.index_select(0, tokens_);
  } else {
    others_ = rows < 0;
    rows_ = rows.clamp_min(0);
  }
}

Tensor Packing::pad(const Tensor& packed) const {
  if (is_whole_) {
    return packed.unsqueeze(0);
  }
  std::vector<int64_t> sizes = packed.sizes().vec();
  sizes[0] = max_len_;
  sizes.insert(sizes.begin(), seqlens_.size(0));
  return packed.index_select(0, sources_).view(sizes).masked_fill_(over_trailing(behind_, packed.dim() + 1), 0);
}

void Packing::unpad(const Tensor& padded, const Tensor& packed) const {
  if (is_whole_) {
    packed.copy_(padded.squeeze(0));
    return;
  }
  const Tensor values = padded.flatten(0, 1).index_select(0, rows_);
  if (tokens_.defined()) {
    packed.index_copy_(0, tokens_, values);
  } else {
    packed.copy_(at::where(over_trailing(others_, packed.dim()), packed, values));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// PackedBatches

PackedBatches::Sequences::Sequences(const Tensor& cu_seqlens, int64_t tokens, int64_t max_len) {
  const Tensor bounds = cu_seqlens.to(at::kLong);
  const int64_t count = bounds.size(0) - 1;
  begins = bounds.narrow(0, 0, count);
  const Tensor ends = bounds.narrow(0, 1, count);
  lengths = ends - begins;
  const Tensor all = at::arange(tokens, bounds.options());
  if (count == 0) {
    offset = at::full({tokens}, -1, bounds.options());
    sequence = at::zeros({tokens}, bounds.options());
    return;
  }
  sequence = at::searchsorted(ends.contiguous(), all, /*out_int32=*/false, /*right=*/true).clamp_(0, count - 1);
  offset = all - begins.index_select(0, sequence);
  offset.masked_fill_((offset < 0).logical_or_(offset >= lengths.index_select(0, sequence)), -1);
  if (!bounds.is_cpu()) {
    broken = (lengths < 0).logical_or_(lengths > max_len).logical_or_(begins < 0).logical_or_(ends > tokens);
  }
}

PackedBatches::PackedBatches(const arguments::AlibiAttention& call, int64_t q_tokens, int64_t k_tokens)
    : q_tokens_(q_tokens),
      k_tokens_(k_tokens),
      of_q_(call.cu_seqlens_q, q_tokens, call.q_len),
      of_k_(
          call.cu_seqlens_k.is_same(call.cu_seqlens_q) && call.k_len == call.q_len && k_tokens == q_tokens
              ? of_q_
              : Sequences(call.cu_seqlens_k, k_tokens, call.k_len)) {
  if (of_q_.broken.defined()) {
    broken_ = of_q_.broken.logical_or(of_k_.broken);
    of_q_.lengths = of_q_.lengths.masked_fill(broken_, 0);
    of_k_.lengths = of_k_.lengths.masked_fill(broken_, 0);
    broken_q_ = broken_.index_select(0, of_q_.sequence);
    broken_k_ = broken_.index_select(0, of_k_.sequence);
  }
  if (call.batch == 0 || call.q_len == 0 || call.k_len == 0 || q_tokens == 0 || k_tokens == 0) {
    return;
  }
  if (of_q_.begins.is_cpu()) {
    divide_on_cpu();
  } else if (call.batch * (call.q_len + call.k_len) <= 2 * (q_tokens + k_tokens)) {
    extents_.push_back({{}, {}, call.batch, call.q_len, call.k_len});
  } else {
    divide_by_capacity(call.q_len, call.k_len);
  }
}

void PackedBatches::divide_on_cpu() {
  struct Members {
    std::vector<int64_t> sequences;
    int64_t q_len = 0;
    int64_t k_len = 0;
  };
  std::map<std::pair<int64_t, int64_t>, Members> batches;
  const int64_t count = of_q_.lengths.size(0);
  const auto* const q_lengths = of_q_.lengths.const_data_ptr<int64_t>();
  const auto* const k_lengths = of_k_.lengths.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    if (q_lengths[i] > 0 && k_lengths[i] > 0) {
      Members& members = batches[{log2_ceil(q_lengths[i]), log2_ceil(k_lengths[i])}];
      members.sequences.push_back(i);
      members.q_len = std::max(members.q_len, q_lengths[i]);
      members.k_len = std::max(members.k_len, k_lengths[i]);
    }
  }
  const auto integers = of_q_.lengths.options();
  std::vector<int64_t> order;
  std::vector<int64_t> rank(count, count);  // `count`: in no batch
  for (const auto& [lengths, members] : batches) {
    const auto first = static_cast<int64_t>(order.size());
    const auto entries = static_cast<int64_t>(members.sequences.size());
    extents_.push_back(
        {at::full({1}, first, integers), at::full({1}, entries, integers), entries, members.q_len, members.k_len});
    for (const int64_t sequence : members.sequences) {
      rank[sequence] = static_cast<int64_t>(order.size());
      order.push_back(sequence);
    }
  }
  order_ = at::tensor(order, integers);
  rank_ = at::tensor(rank, integers);
}

void PackedBatches::divide_by_capacity(int64_t q_len, int64_t k_len) {
  const int64_t count = of_q_.lengths.size(0);
  const auto integers = of_q_.lengths.options();
  std::vector<int64_t> bounds{kShortest};
  while (bounds.back() < std::max(q_len, k_len)) {
    bounds.push_back(2 * bounds.back());
  }
  const auto classes = static_cast<int64_t>(bounds.size());
  const Tensor unused = (of_q_.lengths == 0).logical_or_(of_k_.lengths == 0);
  const Tensor lengths = at::maximum(of_q_.lengths, of_k_.lengths);
  // One scalar at a time: copying `bounds` to the device would wait for it.
  Tensor class_of = at::zeros({count}, integers);
  for (const int64_t bound : bounds) {
    class_of.add_(lengths > bound);
  }
  class_of.masked_fill_(unused, classes);
  order_ = at::argsort(class_of, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  rank_ = at::empty_like(order_).scatter_(0, order_, at::arange(count, integers));
  Tensor first = at::zeros({1}, integers);
  for (int64_t c = 0; c < classes; ++c) {
    const int64_t shortest = c == 0 ? 1 : bounds[c - 1] + 1;
    // Each sequence of the batch has at least this many tokens in its queries or in its keys.
    const bool alike = of_q_.begins.is_same(of_k_.begins);
    const int64_t most = std::min(count, (alike ? q_tokens_ : q_tokens_ + k_tokens_) / shortest);
    const Tensor members = (class_of == c).sum(0, /*keepdim=*/true);
    if (most > 0) {
      extents_.push_back({first, members, round_up(most), std::min(q_len, bounds[c]), std::min(k_len, bounds[c])});
    }
    first = first + members;
  }
}

PackedBatches::Batch PackedBatches::batch(size_t i) const {
  const Extent& extent = extents_[i];
  Packing of_q = packing(of_q_, extent, extent.q_len);
  if (of_q_.begins.is_same(of_k_.begins) && extent.q_len == extent.k_len) {
    return {of_q, of_q};
  }
  return {std::move(of_q), packing(of_k_, extent, extent.k_len)};
}

Packing PackedBatches::sequences(size_t i) const {
  if (!order_.defined()) {
    const Tensor all = at::arange(of_q_.lengths.size(0), of_q_.lengths.options());
    return {all, at::ones_like(all), all, /*max_len=*/1};
  }
  const auto [sequences, empty] = entries(extents_[i]);
  return {sequences, empty.logical_not().to(at::kLong), entries_of_ranks(rank_, extents_[i]), /*max_len=*/1};
}

std::pair<Tensor, Tensor> PackedBatches::entries(const Extent& extent) const {
  const Tensor places = at::arange(extent.entries, order_.options());
  return {order_.index_select(0, (places + extent.first).clamp_max_(order_.size(0) - 1)), places >= extent.count};
}

Tensor PackedBatches::entries_of_ranks(const Tensor& ranks, const Extent& extent) {
  Tensor entry = ranks - extent.first;
  return entry.masked_fill_((entry < 0).logical_or_(entry >= extent.count), -1);
}

Packing PackedBatches::packing(const Sequences& of, const Extent& extent, int64_t max_len) const {
  Tensor begins = of.begins;
  Tensor lengths = of.lengths;
  Tensor entry = of.sequence;
  if (order_.defined()) {
    const auto [sequences, empty] = entries(extent);
    begins = begins.index_select(0, sequences);
    lengths = lengths.index_select(0, sequences).masked_fill_(empty, 0);
    entry = entries_of_ranks(rank_.index_select(0, of.sequence), extent);
  }
  Tensor rows = entry * max_len + of.offset;
  Tensor outside = (entry < 0).logical_or_(of.offset < 0).logical_or_(of.offset >= max_len);
  return {begins, lengths, rows.masked_fill_(outside, -1), max_len};
}

}  // namespace posenc::blockwise
