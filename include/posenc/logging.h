#pragma once

#include <posenc/export.h>

#include <string_view>

/// The library logs messages to standard error through one logger.
///
/// The level is read once from the environment variable `POSENC_LOG_LEVEL`: one of `trace`, `debug`, `info`,
/// `warning`, `error`, `critical`, `off`. Without the variable, or with any other value, it is `warning`.
/// At `debug` the library reports the tables that it builds and the kernels that it chooses. At `warning` it reports
/// each kind of call that uses a slower kernel, once.
///
/// Example:
/// ```
/// posenc::set_log_level(posenc::LogLevel::debug);
/// ```
namespace posenc {

enum class LogLevel : int { trace, debug, info, warning, error, critical, off };

/// Replaces the level taken from `POSENC_LOG_LEVEL`. Safe to call from any thread.
POSENC_API void set_log_level(LogLevel level);

/// The current level.
POSENC_API LogLevel log_level();

/// Writes one line at `level`, or nothing if the current level is higher. Safe to call from any thread.
POSENC_API void log(LogLevel level, std::string_view message);

}  // namespace posenc
