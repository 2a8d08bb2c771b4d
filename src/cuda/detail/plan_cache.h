#pragma once

#include <c10/util/Exception.h>
#include <c10/util/hash.h>

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace posenc::cuda {

/// Everything that a plan depends on.
using PlanKey = std::vector<int64_t>;

/// Keeps the plans that were used last, and forever the plans of captured CUDA graphs, whose kernels run at every
/// replay. Safe to use from several threads.
template <typename Plan>
class PlanCache {
 public:
  /// @param capacity  number of plans that are kept, without those of captured graphs.
  explicit PlanCache(size_t capacity) : capacity_(capacity) {}

  /// The plan of `key`, built by `build` if there is none. Two threads with the same key build it once. Threads with
  /// other keys do not wait.
  /// @param capturing  whether the current stream is being captured. A plan cannot be built then.
  /// @throws c10::Error  if there is no plan during a capture.
  template <typename Build>
  std::shared_ptr<Plan> get(const PlanKey& key, bool capturing, const Build& build) {
    const std::shared_ptr<Slot> slot = capturing ? captured_slot(key) : slot_of(key);
    const std::lock_guard<std::mutex> lock(slot->mutex);
    if (slot->plan == nullptr) {
      slot->plan = build();
      slot->built = true;
    }
    return slot->plan;
  }

 private:
  struct Slot {
    explicit Slot(PlanKey key_) : key(std::move(key_)) {}

    PlanKey key;
    std::mutex mutex;                // held while the plan is built
    std::shared_ptr<Plan> plan;      // null until then
    std::atomic<bool> built{false};  // can be read without `mutex`
  };
  using Slots = std::list<std::shared_ptr<Slot>>;
  struct KeyHash {
    size_t operator()(const PlanKey& key) const { return c10::get_hash(key); }
  };

  std::shared_ptr<Slot> slot_of(const PlanKey& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = captured_.find(key); found != captured_.end()) {
      return found->second;
    }
    if (const auto found = index_.find(key); found != index_.end()) {
      slots_.splice(slots_.begin(), slots_, found->second);
      return slots_.front();
    }
    slots_.push_front(std::make_shared<Slot>(key));
    index_.emplace(key, slots_.begin());
    if (slots_.size() > capacity_) {
      index_.erase(slots_.back()->key);
      slots_.pop_back();
    }
    return slots_.front();
  }

  /// A slot whose plan is kept forever. No plan is dropped here: that would invalidate the capture.
  std::shared_ptr<Slot> captured_slot(const PlanKey& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = captured_.find(key); found != captured_.end()) {
      return found->second;
    }
    const auto found = index_.find(key);
    TORCH_CHECK(
        found != index_.end() && (*found->second)->built,
        "posenc::alibi_attention: expected a cuDNN plan for these sizes before a CUDA graph is captured, got none: "
        "call the same forward and backward pass once before the capture");
    return captured_.emplace(key, *found->second).first->second;
  }

  size_t capacity_;
  std::mutex mutex_;
  Slots slots_;  // most recent first
  std::unordered_map<PlanKey, typename Slots::iterator, KeyHash> index_;
  std::unordered_map<PlanKey, std::shared_ptr<Slot>, KeyHash> captured_;
};

}  // namespace posenc::cuda
