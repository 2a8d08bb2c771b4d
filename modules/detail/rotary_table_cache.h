#pragma once

#include <posenc/frequencies.h>

#include <torch/types.h>

#include <cstdint>
#include <list>
#include <mutex>
#include <tuple>
#include <vector>

namespace posenc::detail {

/// What tables are computed from.
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

/// The frequency of each pair: `inv_freq[pair_frequencies[j]]`, or `inv_freq` where `pair_frequencies` is empty.
torch::Tensor frequencies_of_pairs(const torch::Tensor& inv_freq, const std::vector<int64_t>& pair_frequencies);

/// The tables of one plan, by set of frequencies, device and dtype. Safe to use from several threads.
///
/// Tables are never replaced in place nor freed while kernels in flight or captured graphs may read them. Where a plan
/// has one set of frequencies or two, no table is freed before this object is; as its length at least doubles, those of
/// one set hold less than two of the last together. Dynamic NTK has a set for every length beyond its own: of those
/// that neither `reserve` nor a captured graph holds on to, the ones last used are kept, `kRecentSets` of them. A freed
/// table has been recorded on every stream that read it, so that the allocator hands its memory out again only after
/// that.
class RotaryTableCache {
 public:
  /// @param initial_length  rows of tables when they are first built, if no more are needed.
  RotaryTableCache(RotaryTableSource source, int64_t initial_length);

  /// Whether these are the tables that the constructor would start with the same arguments.
  bool serves(const RotaryTableSource& source, int64_t initial_length) const;

  /// `cos` and `sin` for a sequence of `seq_len` positions, and of at least as many rows.
  std::tuple<torch::Tensor, torch::Tensor> get(int64_t seq_len, const torch::Device& device, torch::Dtype dtype);

  /// Makes sure that `get` finds its tables built, and that they stay.
  void reserve(int64_t seq_len, const torch::Device& device, torch::Dtype dtype);

  /// Rows of the longest tables, 0 where there are none.
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
    std::vector<Table> built;  // of one device and dtype the last is the longest
  };

  Set& find_or_add_set(int64_t seq_len);
  void drop_old_sets();
  static const Table* find(const Set& set, const torch::Device& device, torch::Dtype dtype);
  static const Table& find_or_build(Set& set, int64_t length, const torch::Device& device, torch::Dtype dtype);

  RotaryTableSource source_;
  int64_t initial_length_;
  mutable std::mutex mutex_;
  std::list<Set> sets_;  // the one last used first
};

}  // namespace posenc::detail
