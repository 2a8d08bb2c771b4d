#include "support.h"

#include <cuda/detail/plan_cache.h>

#include <array>
#include <thread>

namespace posenc::test {
namespace {

using Cache = cuda::PlanCache<int>;

/// `cache.get`, whose plan is the number of plans built so far.
std::shared_ptr<int> get(Cache& cache, int64_t key, int& built, bool capturing = false) {
  return cache.get({key}, capturing, [&] { return std::make_shared<int>(++built); });
}

TEST(PlanCache, BuildsAPlanOnce) {
  Cache cache(/*capacity=*/2);
  int built = 0;
  EXPECT_EQ(get(cache, 1, built), get(cache, 1, built));
  EXPECT_EQ(built, 1);
}

TEST(PlanCache, DropsThePlanThatWasUsedLeastRecently) {
  Cache cache(/*capacity=*/2);
  int built = 0;
  for (const int64_t key : {1, 2, 1, 3}) {  // drops 2
    get(cache, key, built);
  }
  EXPECT_EQ(*get(cache, 1, built), 1);
  EXPECT_EQ(*get(cache, 2, built), 4);
}

TEST(PlanCache, RefusesACaptureWithoutAPlan) {
  Cache cache(/*capacity=*/2);
  int built = 0;
  get(cache, 1, built);
  expect_error(
      [&] { get(cache, 2, built, /*capturing=*/true); },
      {"expected a cuDNN plan for these sizes before a CUDA graph is captured", "got none"});
  EXPECT_EQ(built, 1);
}

TEST(PlanCache, KeepsThePlansOfCapturedGraphs) {
  Cache cache(/*capacity=*/1);
  int built = 0;
  const auto captured = get(cache, 1, built);
  EXPECT_EQ(get(cache, 1, built, /*capturing=*/true), captured);
  get(cache, 2, built);
  get(cache, 3, built);
  EXPECT_EQ(get(cache, 1, built), captured);
  EXPECT_EQ(get(cache, 1, built, /*capturing=*/true), captured) << "a second capture";
}

TEST(PlanCache, TriesAgainAfterAPlanFailed) {
  Cache cache(/*capacity=*/1);
  EXPECT_THROW(cache.get({1}, /*capturing=*/false, []() -> std::shared_ptr<int> { TORCH_CHECK(false); }), c10::Error);
  int built = 0;
  EXPECT_EQ(*get(cache, 1, built), 1);
}

TEST(PlanCache, ThreadsBuildAPlanOnce) {
  Cache cache(/*capacity=*/2);
  int built = 0;  // written under the lock of the plan
  std::array<std::shared_ptr<int>, 4> plans;
  std::vector<std::thread> threads;
  threads.reserve(plans.size());
  for (std::shared_ptr<int>& plan : plans) {
    threads.emplace_back([&] { plan = get(cache, 1, built); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(built, 1);
  for (const std::shared_ptr<int>& plan : plans) {
    EXPECT_EQ(plan, plans[0]);
  }
}

}  // namespace
}  // namespace posenc::test
