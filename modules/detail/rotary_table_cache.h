#pragma once

#include <posenc/frequencies.h>

#include <torch/types.h>

#include <cstdint>
#include <list>
#include <mutex>
#include <tuple>
#include <vector>

namespace posenc::detail {

/// The parameters that determine tables.
struct RotaryTableSource {
  int64_t rotary_dim;
  double base;
  RotaryScaling scaling;
  std::vector<int64_t> pair_frequencies;  // see RotaryEmbeddingOptions

  friend bool operator==(const RotaryTableSource& a, const RotaryTableSource& b) {
    return std::tie(a.rotary_dim, a.base, a.scaling, a.pair_frequencies) ==
        std::tie(b.rotary_dim, b.base, b.scaling, b.pair_frequencies);
  }
};

/// The frequency of each pair j: `inv_freq[pair_frequencies[j]]`, or `inv_freq[j]` if `pair_frequencies` is empty.
torch::Tensor frequencies_of_pairs(const torch::Tensor& inv_freq, const std::vector<int64_t>& pair_frequencies);

/// The tables of one plan for each set of frequencies, device and dtype. Safe to use from several threads.
///
/// Tables are neither modified nor freed while kernels in flight or captured graphs may read them. For a plan with one
/// or two sets of frequencies no table is freed during the lifetime of this object. Each new table of a set is at least
/// twice as long as the one before, so all of them take less than twice the memory of the last one. Dynamic NTK has a
/// set for every length beyond `max_position_embeddings`. Of the sets that neither `reserve` nor a captured graph
/// holds, `kRecentSets` are kept, the ones last used. A freed table has been recorded on every stream that read it, so
/// the allocator reuses its memory only after these reads.
class RotaryTableCache {
 public:
  /// @param initial_length  number of rows of the first tables, if no more are needed.
  RotaryTableCache(RotaryTableSource source, int64_t initial_length);

  /// Whether the constructor was called with these arguments.
  bool serves(const RotaryTableSource& source, int64_t initial_length) const;

  /// `cos` and `sin` for a sequence of `seq_len` positions, with at least `seq_len` rows.
  std::tuple<torch::Tensor, torch::Tensor> get(int64_t seq_len, const torch::Device& device, torch::Dtype dtype);

  /// Builds the tables that `get` will return, and keeps them.
  void reserve(int64_t seq_len, const torch::Device& device, torch::Dtype dtype);

  /// The number of rows of the longest tables, 0 if there are none.
  int64_t length(const torch::Device& device, torch::Dtype dtype) const;

 private:
  static constexpr int kRecentSets = 4;

  struct Table {
    torch::Device device;
    torch::Dtype dtype;
    torch::Tensor cos, sin;

    int64_t length() const { return cos.size(0); }
  };

  /// The tables of one set of frequencies.
  struct Set {
    int64_t frequency_length;  // see rotary_frequency_length
    RotaryFrequencies frequencies;
    int64_t initial_length;
    bool kept;
    std::vector<Table> built;  // for each device and dtype the last one is the longest
  };

  Set& find_or_add_set(int64_t seq_len);
  void drop_old_sets();
  static const Table* find(const Set& set, const torch::Device& device, torch::Dtype dtype);
  static const Table& find_or_build(Set& set, int64_t length, const torch::Device& device, torch::Dtype dtype);

  RotaryTableSource source_;
  int64_t initial_length_;
  mutable std::mutex mutex_;
  std::list<Set> sets_;  // most recently used first
};

}  // namespace posenc::detail
