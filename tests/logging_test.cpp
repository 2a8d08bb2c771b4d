#include "support.h"

#include <posenc/logging.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace posenc::test {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// POSENC_LOG_LEVEL is read once per process, so each value is tested in its own process. GoogleTest runs suites named
// *DeathTest first, before this process has read the level.

using LevelName = std::pair<const char*, LogLevel>;

std::string level_name(const ::testing::TestParamInfo<LevelName>& info) {
  return info.param.first;
}

class LogLevelDeathTest : public ::testing::TestWithParam<LevelName> {};

INSTANTIATE_TEST_SUITE_P(
    Names,
    LogLevelDeathTest,
    ::testing::Values(
        LevelName("trace", LogLevel::trace),
        LevelName("debug", LogLevel::debug),
        LevelName("info", LogLevel::info),
        LevelName("warning", LogLevel::warning),
        LevelName("error", LogLevel::error),
        LevelName("critical", LogLevel::critical),
        LevelName("off", LogLevel::off)),
    level_name);

INSTANTIATE_TEST_SUITE_P(
    NoName,
    LogLevelDeathTest,
    ::testing::Values(
        LevelName(nullptr, LogLevel::warning),
        LevelName("", LogLevel::warning),
        LevelName("loud", LogLevel::warning)));

TEST_P(LogLevelDeathTest, IsReadFromTheEnvironment) {
  const ScopedEnv environment("POSENC_LOG_LEVEL", GetParam().first);
  EXPECT_EXIT(
      std::_Exit(100 + static_cast<int>(log_level())),
      ::testing::ExitedWithCode(100 + static_cast<int>(GetParam().second)), "");
}

// ---------------------------------------------------------------------------------------------------------------------
// Lines

/// Restores the level after each test.
class Logging : public ::testing::Test {
 protected:
  void SetUp() override { before_ = log_level(); }
  void TearDown() override { set_log_level(before_); }

  static std::string captured(const std::function<void()>& action) {
    ::testing::internal::CaptureStderr();
    action();
    return ::testing::internal::GetCapturedStderr();
  }

 private:
  LogLevel before_ = LogLevel::warning;
};

TEST_F(Logging, LevelCanBeSet) {
  for (const LogLevel level :
       {LogLevel::trace, LogLevel::debug, LogLevel::info, LogLevel::warning, LogLevel::error, LogLevel::critical,
        LogLevel::off}) {
    set_log_level(level);
    EXPECT_EQ(log_level(), level);
  }
}

TEST_F(Logging, WritesOneLineToStandardError) {
  set_log_level(LogLevel::debug);
  const std::string text = captured([] { log(LogLevel::debug, "tables were built"); });
  EXPECT_NE(text.find("posenc"), std::string::npos) << text;
  EXPECT_NE(text.find("debug"), std::string::npos) << text;
  EXPECT_NE(text.find("tables were built"), std::string::npos) << text;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << text;
}

TEST_F(Logging, LevelsBelowTheOneInForceAreSilent) {
  set_log_level(LogLevel::warning);
  EXPECT_EQ(captured([] { log(LogLevel::info, "unheard"); }), "");
  EXPECT_NE(captured([] { log(LogLevel::warning, "heard"); }), "");
  EXPECT_NE(captured([] { log(LogLevel::error, "heard"); }), "");
}

TEST_F(Logging, OffIsSilentAboutEverything) {
  set_log_level(LogLevel::off);
  EXPECT_EQ(captured([] { log(LogLevel::critical, "unheard"); }), "");
}

TEST_F(Logging, MessagesAreNotFormatStrings) {
  set_log_level(LogLevel::info);
  const std::string text = captured([] { log(LogLevel::info, "{} %s {0}"); });
  EXPECT_NE(text.find("{} %s {0}"), std::string::npos) << text;
}

TEST_F(Logging, MessagesEndWhereTheirViewEnds) {
  set_log_level(LogLevel::info);
  const std::string text = captured([] { log(LogLevel::info, std::string_view("kept dropped").substr(0, 4)); });
  EXPECT_NE(text.find("kept"), std::string::npos) << text;
  EXPECT_EQ(text.find("dropped"), std::string::npos) << text;
}

TEST_F(Logging, LinesOfSeveralThreadsStayWhole) {
  constexpr int kThreads = 4;
  constexpr int kLines = 50;
  set_log_level(LogLevel::info);
  const std::string text = captured([] {
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([] {
        for (int i = 0; i < kLines; ++i) {
          log(LogLevel::info, "<whole>");
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
  });
  const std::string line = text.substr(0, text.find('\n') + 1);
  EXPECT_NE(line.find("<whole>"), std::string::npos) << text;
  std::string expected;
  for (int i = 0; i < kThreads * kLines; ++i) {
    expected += line;
  }
  EXPECT_EQ(text, expected);
}

}  // namespace
}  // namespace posenc::test
