#include "context_parallel_support.h"

#ifdef USE_DISTRIBUTED
#include <ATen/ATen.h>

#include <chrono>
#include <condition_variable>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <queue>

namespace posenc::test {
namespace {

/// What travels between ranks that are threads of this process.
class Mail {
 public:
  void send(int from, int to, at::Tensor message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    messages_[{from, to}].push(std::move(message));
    arrived_.notify_all();
  }

  at::Tensor receive(int from, int to) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::queue<at::Tensor>& messages = messages_[{from, to}];
    arrived_.wait(lock, [&] { return !messages.empty(); });
    at::Tensor message = std::move(messages.front());
    messages.pop();
    return message;
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::map<std::pair<int, int>, std::queue<at::Tensor>> messages_;
};

/// The one collective that the operator needs.
class ThreadsBackend : public c10d::Backend {
 public:
  ThreadsBackend(std::shared_ptr<Mail> mail, int rank, int size) : Backend(rank, size), mail_(std::move(mail)) {}

  c10::intrusive_ptr<c10d::Work> alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& output_sizes,
      std::vector<int64_t>& input_sizes,
      const c10d::AllToAllOptions& /*options*/) override {
    const std::vector<at::Tensor> sent = input.split_with_sizes(input_sizes);
    for (int to = 0; to < getSize(); ++to) {
      mail_->send(getRank(), to, sent[to].clone());
    }
    return c10::make_intrusive<Receipt>(mail_, getRank(), output.split_with_sizes(output_sizes));
  }

 private:
  /// Nothing is there before it is waited for: not to wait would be seen.
  class Receipt : public c10d::Work {
   public:
    Receipt(std::shared_ptr<Mail> mail, int rank, std::vector<at::Tensor> parts)
        : mail_(std::move(mail)), rank_of_receiver_(rank), parts_(std::move(parts)) {}

    bool wait(std::chrono::milliseconds /*timeout*/) override {
      for (size_t from = 0; from < parts_.size(); ++from) {
        parts_[from].copy_(mail_->receive(static_cast<int>(from), rank_of_receiver_));
      }
      return true;
    }

   private:
    std::shared_ptr<Mail> mail_;
    int rank_of_receiver_;
    std::vector<at::Tensor> parts_;
  };

  std::shared_ptr<Mail> mail_;
};

}  // namespace

Group group_of(int size) {
  return c10::make_intrusive<c10d::ProcessGroup>(/*rank=*/0, size);
}

void for_each_rank(int size, at::DeviceType device, const std::function<void(const Group&)>& body) {
  const auto mail = std::make_shared<Mail>();
  std::vector<std::future<void>> ranks;
  for (int rank = 0; rank < size; ++rank) {
    auto group = c10::make_intrusive<c10d::ProcessGroup>(rank, size);
    group->setBackend(
        device, c10d::ProcessGroup::CUSTOM,
        c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<ThreadsBackend>(mail, rank, size)));
    ranks.push_back(std::async(std::launch::async, [&body, group] { body(group); }));
  }
  for (std::future<void>& rank : ranks) {
    rank.get();
  }
}

}  // namespace posenc::test
#endif
