#include "support.h"

#include <ATen/Context.h>
#include <torch/version.h>

#include <iostream>

namespace {

/// Exit status that ctest reports as "skipped": SKIP_RETURN_CODE in CMakeLists.txt.
constexpr int kAllSkipped = 77;

/// Seeds torch before each test, so that a test draws the same numbers regardless of which other tests run.
class SeedEachTest : public ::testing::EmptyTestEventListener {
  void OnTestStart(const ::testing::TestInfo& /*info*/) override { at::manual_seed(posenc::test::seed()); }
};

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  // gtest owns the listener.
  ::testing::UnitTest::GetInstance()->listeners().Append(new SeedEachTest);
  const std::string no_cuda = posenc::test::unavailable(at::kCUDA);
  std::cout << "torch " << TORCH_VERSION << ", seed " << posenc::test::seed() << ", CUDA "
            << (no_cuda.empty() ? "available" : "not tested: " + no_cuda) << '\n'
            << std::flush;
  const int result = RUN_ALL_TESTS();
  const auto& run = *::testing::UnitTest::GetInstance();
  const bool all_skipped = run.test_to_run_count() > 0 && run.skipped_test_count() == run.test_to_run_count();
  return result == 0 && all_skipped ? kAllSkipped : result;
}
