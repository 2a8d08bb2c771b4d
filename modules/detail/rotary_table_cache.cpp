#include "rotary_table_cache.h"

#include <posenc/detail/stream_capture.h>
#include <posenc/logging.h>

#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/utils.h>

#include <algorithm>
#include <utility>

namespace posenc::detail {

using torch::Tensor;

Tensor frequencies_of_pairs(const Tensor& inv_freq, const std::vector<int64_t>& pair_frequencies) {
  return pair_frequencies.empty() ? inv_freq : inv_freq.index_select(0, torch::tensor(pair_frequencies));
}

RotaryTableCache::RotaryTableCache(RotaryTableSource source, int64_t initial_length)
    : source_(std::move(source)), initial_length_(initial_length) {
  find_or_add_set(0);  // reports bad options in the constructor
}

bool RotaryTableCache::serves(const RotaryTableSource& source, int64_t initial_length) const {
  return source_ == source && initial_length_ == initial_length;
}

std::tuple<Tensor, Tensor> RotaryTableCache::get(int64_t seq_len, const torch::Device& device, torch::Dtype dtype) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Set& set = find_or_add_set(seq_len);
  const Table& table = find_or_build(set, seq_len, device, dtype);
  if (!set.kept) {
    if (is_capturing(device)) {
      set.kept = true;
    } else if (device.is_cuda()) {
      const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
      table.cos.record_stream(stream);
      table.sin.record_stream(stream);
    }
    drop_old_sets();
  }
  return {table.cos, table.sin};
}

void RotaryTableCache::reserve(int64_t seq_len, const torch::Device& device, torch::Dtype dtype) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Set& set = find_or_add_set(seq_len);
  set.kept = true;
  find_or_build(set, seq_len, device, dtype);
}

int64_t RotaryTableCache::length(const torch::Device& device, torch::Dtype dtype) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t longest = 0;
  for (const Set& set : sets_) {
    const Table* table = find(set, device, dtype);
    longest = std::max(longest, table == nullptr ? 0 : table->length());
  }
  return longest;
}

RotaryTableCache::Set& RotaryTableCache::find_or_add_set(int64_t seq_len) {
  const int64_t frequency_length = rotary_frequency_length(source_.scaling, seq_len);
  const auto found = std::find_if(
      sets_.begin(), sets_.end(), [=](const Set& set) { return set.frequency_length == frequency_length; });
  if (found != sets_.end()) {
    sets_.splice(sets_.begin(), sets_, found);
    return sets_.front();
  }
  // Frequencies of dynamic NTK beyond max_position_embeddings serve one length only: their tables need no spare rows.
  const auto* dynamic = std::get_if<DynamicNtkScaling>(&source_.scaling);
  const bool of_one_length = dynamic != nullptr && frequency_length > dynamic->max_position_embeddings;
  const torch::InferenceMode no_inference(false);
  const torch::NoGradGuard no_grad;
  RotaryFrequencies frequencies = rotary_frequencies(source_.rotary_dim, source_.base, source_.scaling, seq_len);
  frequencies.inv_freq = frequencies_of_pairs(frequencies.inv_freq, source_.pair_frequencies);
  return sets_.emplace_front(
      Set{frequency_length,
          std::move(frequencies),
          of_one_length ? frequency_length : initial_length_,
          /*kept=*/!of_one_length,
          {}});
}

void RotaryTableCache::drop_old_sets() {
  int seen = 0;
  sets_.remove_if([&seen](const Set& set) { return !set.kept && ++seen > kRecentSets; });
}

const RotaryTableCache::Table* RotaryTableCache::find(const Set& set, const torch::Device& device, torch::Dtype dtype) {
  const auto found = std::find_if(set.built.rbegin(), set.built.rend(), [&](const Table& table) {
    return table.device == device && table.dtype == dtype;
  });
  return found == set.built.rend() ? nullptr : &*found;
}

/// Builds tables on the CPU, so that every device has the same bits. The copy is synchronous, so that no other stream
/// reads a table before it is complete. Tables are not inference tensors, because a training step may use them later.
const RotaryTableCache::Table& RotaryTableCache::find_or_build(
    Set& set,
    int64_t length,
    const torch::Device& device,
    torch::Dtype dtype) {
  const Table* table = find(set, device, dtype);
  if (table != nullptr && table->length() >= length) {
    return *table;
  }
  TORCH_CHECK(
      !is_capturing(device), "posenc::RotaryEmbedding: expected tables of ", length, " positions on ", device,
      " to be there before a graph is captured, got ", table == nullptr ? 0 : table->length(),
      "; call reserve, or forward with inputs of these sizes, before the capture");
  const int64_t doubled = table == nullptr ? set.initial_length : 2 * table->length();
  const torch::InferenceMode no_inference(false);
  const torch::NoGradGuard no_grad;
  const auto [cos, sin] =
      rotary_tables(set.frequencies.inv_freq, std::max(length, doubled), dtype, set.frequencies.attention_factor);
  if (log_level() <= LogLevel::debug) {
    log(LogLevel::debug,
        c10::str("RotaryEmbedding: built ", dtype, " tables of ", cos.size(0), " positions on ", device));
  }
  return set.built.emplace_back(Table{device, dtype, cos.to(device), sin.to(device)});
}

}  // namespace posenc::detail
