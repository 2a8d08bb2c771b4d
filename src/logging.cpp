#include <posenc/logging.h>

#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdlib>
#include <memory>

// The only file that includes spdlog: spdlog and torch contain different copies of fmt.
namespace posenc {
namespace {

static_assert(static_cast<int>(LogLevel::trace) == static_cast<int>(spdlog::level::trace));
static_assert(static_cast<int>(LogLevel::off) == static_cast<int>(spdlog::level::off));

spdlog::level::level_enum level_from_environment() {
  const char* name = std::getenv("POSENC_LOG_LEVEL");
  if (name == nullptr || *name == '\0') {
    return spdlog::level::warn;
  }
  // from_str returns `off` for an unknown name.
  const auto level = spdlog::level::from_str(name);
  return level == spdlog::level::off && std::string_view(name) != "off" ? spdlog::level::warn : level;
}

/// The logger of posenc. It is not in spdlog's registry and does not affect the application's loggers and patterns.
spdlog::logger& logger() {
  static const auto instance = [] {
    auto made = std::make_shared<spdlog::logger>("posenc", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
    made->set_pattern("[%n] [%^%l%$] %v");
    made->set_level(level_from_environment());
    return made;
  }();
  return *instance;
}

}  // namespace

void set_log_level(LogLevel level) {
  logger().set_level(static_cast<spdlog::level::level_enum>(level));
}

LogLevel log_level() {
  return static_cast<LogLevel>(logger().level());
}

void log(LogLevel level, std::string_view message) {
  logger().log(static_cast<spdlog::level::level_enum>(level), spdlog::string_view_t(message.data(), message.size()));
}

}  // namespace posenc
